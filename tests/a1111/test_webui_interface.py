"""The accordion, tab and settings against a gradio that knows only what 3.41.2 and 4.40.0 have in common.

The lists below were read off both versions' signatures; anything else raises, as the real ones would somewhere.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_prefix
from fake_host import Host, fake_host
from PIL import Image
from test_webui_jobs import carries

COMMON = {"label", "value", "visible", "interactive", "elem_id", "elem_classes", "scale"}
ARGUMENTS = {
    "Accordion": {"label", "open", "elem_id", "visible"}, "Row": {"visible", "elem_id"}, "Checkbox": COMMON | {"info"},
    "Dropdown": COMMON | {"choices", "info"}, "Radio": COMMON | {"choices", "info"}, "Button": COMMON,
    "HTML": {"value", "label", "visible", "elem_id"}, "Image": COMMON | {"type", "height", "width"},
    "Slider": COMMON | {"minimum", "maximum", "step"}, "Textbox": COMMON | {"lines"},
    "Blocks": {"analytics_enabled", "title"},
}
EVENTS = {"fn", "inputs", "outputs", "show_progress"}


def stub() -> types.ModuleType:
    made = types.ModuleType("gradio")
    made.built = []

    class Component:
        positional = ("label",)

        def __init__(self, *args: Any, **given: Any) -> None:
            kind = type(self).__name__
            given |= dict(zip(self.positional, args, strict=False))
            unknown = set(given) - ARGUMENTS[kind]
            if unknown:
                raise TypeError(f"{kind} has no {unknown} in one of the versions")
            self.__dict__.update({"value": None, "label": None, "choices": None, **given})
            self.events: list[Any] = []
            made.built.append(self)

        def _on(self, **given: Any) -> None:
            if set(given) - EVENTS:
                raise TypeError(f"events have no {set(given) - EVENTS}")
            self.events.append(given)

        change = click = _on

        def __enter__(self) -> Component:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    for name in ARGUMENTS:
        first = ("value",) if name in ("Button", "HTML") else ("label",)
        setattr(made, name, type(name, (Component,), {"positional": first}))
    made.update = lambda **values: {"__type__": "update", **values}
    return made


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    made = stub()
    monkeypatch.setitem(sys.modules, "gradio", made)
    yield made


def test_the_accordion_is_built_from_what_both_versions_have(host: Host, gradio: Any) -> None:
    script = host.shim.Script()
    for is_img2img in (False, True, False):  # the host's API calls it more than once
        controls = script.ui(is_img2img)
        assert [control.label for control in controls] == ["Enable", "Prefix", "Level"]
        assert all(control.do_not_save_to_config for control in controls)
    enabled, prefix, level = controls
    assert (enabled.value, prefix.value, level.value) == (False, "test", "whole training")
    assert level.choices == ["whole training", "step 400"]
    assert script.title() == "Anonymize" and script.show(False) is host.modules["modules.scripts"].AlwaysVisible
    line = enabled.events[0]["fn"]
    assert "active: test" in line(True, "test", "whole training") and "10 of 75" in line(True, "test", "whole training")
    assert "off" in line(False, "test", None)
    assert "NOT ACTIVE" in line(True, "<b>none", None) and "<b>" not in line(True, "<b>none", None)


def test_before_a_checkpoint_is_loaded_nothing_is_claimed(host: Host, gradio: Any) -> None:
    stand_in = type("FakeInitialModel", (), {"cond_stage_model": None})()  # Forge's, until the first picture
    for model in (None, stand_in):
        host.modules["modules.sd_models"].model_data.sd_model = model
        line = host.ours("state").state_line(True, "test", None)
        assert "on: test" in line and "active" not in line
        assert host.shim.Script().ui(False)[1].choices[0] == "anonymize-miniature"
        with pytest.raises(Exception, match="No checkpoint"):
            host.job("a man", args=(True, "test"))


def test_the_line_says_when_long_prompts_cost_a_second_pass(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    line = host.ours("state").state_line
    assert "two passes" not in line(True, "test", None)  # a host without the option
    host.shared.opts.data["pad_cond_uncond"] = False
    assert "66 to 75 tokens become two chunks: two passes a step" in line(True, "test", None)
    assert "two passes" not in line(False, "test", None)
    monkeypatch.setitem(sys.modules, "modules_forge", types.ModuleType("modules_forge"))
    assert "two passes" not in line(True, "test", None)
    monkeypatch.delitem(sys.modules, "modules_forge")
    host.shared.opts.data["pad_cond_uncond"] = True
    assert "two passes" not in line(True, "test", None)


def test_only_files_that_fit_are_without_a_remark(host: Host, gradio: Any) -> None:
    make_prefix(host.folder / "prefixes", "wide", widths={"emb_params": 768})
    script = host.shim.Script()
    prefix = script.ui(False)[1]
    assert "test" in prefix.choices and "wide (does not fit this model)" in prefix.choices
    host.job("a man")
    with pytest.raises(Exception, match="width 768"):
        host.job("a man", args=(True, "wide (does not fit this model)"))
    assert "width 768" in host.ours("state").state_line(True, "wide (does not fit this model)", None)


def test_paste_never_switches_it_off(host: Host, gradio: Any) -> None:
    script = host.shim.Script()
    script.ui(False)
    functions = [function for _, function in script.infotext_fields]
    for values in ({}, {"APL": "nonsense"}, {"Steps": "8"}, {"APL": None}):
        assert [function(values) for function in functions] == [None] * 3  # as it is, for pages and for the API
    on, prefix, level = (function({"APL": "test [00000000], level 400"}) for function in functions)
    assert on is True and prefix["value"] == "test" and level["value"] == "step 400"
    on, prefix, level = (function({"APL": "elsewhere [00000000]"}) for function in functions)
    assert on is True and prefix is None and level is None
    assert script.paste_field_names == ["APL"]


def test_an_enforced_accordion_cannot_be_changed(tmp_path: Path, gradio: Any) -> None:
    from test_webui_policy import enforced

    with enforced("a1111", tmp_path) as host:
        script = host.shim.Script()
        controls = script.ui(False)
        assert [control.interactive for control in controls] == [False] * 3
        assert controls[0].value is True
        line = host.ours("state").state_line(False, "", None)
        assert "active: house" in line and "operator" in line
        assert all(function({"APL": "test [00000000]"}) is None for _, function in script.infotext_fields)
        assert "no picture without" in host.ours("compare").before_and_after("test", None)


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_counter_follows_the_accordion(host: Host, gradio: Any, ours_first: bool) -> None:
    """By the ids that the hosts give their components, in whatever order a page has them; and once."""
    counted = []
    page = types.SimpleNamespace(update_token_counter=lambda text, steps, styles, *, is_positive=True: counted.append(
        (text, steps, styles)) or "<span>3/65</span>")
    host.modules["modules"].ui = sys.modules["modules.ui"] = page
    parts = {name: gradio.HTML(elem_id=f"txt2img_{name}") for name in ("prompt", "steps", "styles", "token_counter")}
    others = [gradio.HTML(elem_id=name) for name in ("txt2img_negative_token_counter", "img2img_prompt", None)]

    def build() -> list[Any]:
        return host.shim.Script().ui(False)

    host.callbacks.fire("on_before_ui")
    controls = build() if ours_first else []
    for component in (*parts.values(), *others):
        host.callbacks.fire("on_after_component", component)
    controls = controls or build()
    again = build()  # by the host's API, outside of the page
    for control in controls:
        (event,) = [event for event in control.events if event["outputs"] == [parts["token_counter"]]]
        assert event["inputs"] == [*controls, parts["prompt"], parts["steps"], parts["styles"]]
        assert event["fn"](True, "test", "step 400", "a man", 20, ["s"]) == "<span>3/65</span>"
    assert counted == [("a man", 20, ["s"])] * 3
    assert host.ours("counter")._choice().level == 400
    assert not any(event["outputs"] == [parts["token_counter"]] for control in again for event in control.events)


def test_the_pair_needs_a_picture_first(host: Host, gradio: Any) -> None:
    assert "no picture yet" in host.ours("compare").before_and_after("test", None)


def test_the_pair_is_drawn_after_an_interrupted_job(host: Host, gradio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's *Interrupt* holds until another job begins; pictures of the comparison are no last pictures."""
    compare, state, drawn = host.ours("compare"), host.shared.state, []
    state.begin = lambda job: state.__dict__.update(interrupted=False, job=job)
    state.end = lambda: state.__dict__.update(job="")
    monkeypatch.setitem(sys.modules, "modules.call_queue", types.SimpleNamespace(queue_lock=threading.Lock()))
    monkeypatch.setattr(host.modules["modules"], "call_queue", sys.modules["modules.call_queue"], raising=False)

    def process_images(p: Any) -> Any:
        host.processing.process_images_inner(p)
        drawn.append(carries(p.c[0][0], host.prefix.vectors()))
        made = [] if state.interrupted or len(drawn) > 2 else [Image.new("RGB", (8, 8))]
        return types.SimpleNamespace(images=made, index_of_first_image=0)

    kind = host.processing.StableDiffusionProcessing
    monkeypatch.setattr(host.processing, "process_images", process_images, raising=False)
    monkeypatch.setattr(host.processing, "StableDiffusionProcessingTxt2Img", raising=False,
                        value=lambda sd_model, do_not_save_samples, do_not_save_grid, **known: kind(**known))
    monkeypatch.setattr(host.shared, "sd_model", None, raising=False)
    compare.LAST.settings, state.interrupted = {"prompt": "a man"}, True
    try:
        assert compare.before_and_after("test", None).count("<img") == 2
        assert drawn == [False, True] and state.job == "" and compare.LAST.images == []
        assert "was interrupted" in compare.before_and_after("test", None)
    finally:
        compare.LAST.settings = compare.LAST.pair = None


def test_settings_are_made_and_restricted_only_where_enforced(host: Host, gradio: Any) -> None:
    added = {}

    class OptionInfo:
        def __init__(self, default: Any, label: str, component: Any, arguments: dict, section: tuple) -> None:
            component(**{key: value for key, value in arguments.items() if key != "interactive"})
            self.default, self.section, self.restrict_api = default, section, None

    host.shared.OptionInfo = OptionInfo
    host.shared.opts.__dict__["add_option"] = added.__setitem__
    host.callbacks.fire("on_ui_settings")
    assert set(added) == {"apl_default_enabled", "apl_default_prefix", "apl_recogniser", "apl_threshold"}
    assert not any(option.restrict_api for option in added.values())


def test_the_identity_tab_is_built_and_says_what_is_missing(host: Host, gradio: Any) -> None:
    tabs = host.callbacks.fire("on_ui_tabs")[0]
    assert tabs[0][1:] == ("Identity check", "apl_identity")
    identity = host.ours("identity")
    assert "no reference picture" in identity.check("last pictures", None, None)
    picture = np.zeros((64, 64, 3), np.uint8)
    assert "no picture to check" in identity.check("last pictures", None, picture)
    host.shared.opts.data["apl_recogniser"] = "auraface"
    said = identity.check("picture", picture, picture)
    assert "apl-bad" in said and ("pip install" in said or "Fetch it" in said)  # one line with what to run


def test_the_identity_check_scores_with_a_recogniser(host: Host, gradio: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("insightface")
    import shutil
    import zipfile

    assets = Path(__file__).resolve().parents[2] / "apl_train" / "miniworld" / "assets"
    shutil.copytree(assets / "faces", host.folder / "insightface" / "models" / "miniature")
    host.shared.opts.data["apl_recogniser"] = "miniature"
    with zipfile.ZipFile(assets / "references.zip") as held:
        names = sorted(name for name in held.namelist() if name.endswith(".webp"))
        person = names[0].split("/")[0]
        mine = [name for name in names if name.startswith(f"{person}/")]
        other = next(name for name in names if not name.startswith(f"{person}/"))
        pictures = []
        for name in (*mine, other):
            with held.open(name) as file:
                pictures.append(np.array(Image.open(file).convert("RGB")))
    identity = host.ours("identity")
    blank = np.full((128, 128, 3), 127, np.uint8)
    found = identity.score([pictures[1], pictures[-1], blank], [pictures[0]], 0.32)
    assert found.similarities[0] > 0.8 > 0.5 > found.similarities[1]
    assert found.as_dict()["similarities"][2] is None and found.as_dict()["faces"] == 2
    shown = identity.table(found, ["same", "<other>", "blank"])
    assert "no face" in shown and "&lt;other&gt;" in shown and "threshold 0.32" in shown
    body = json.loads(json.dumps(found.as_dict()))
    assert body["recognised"] == 1 and body["rejected_references"] == []
    again = identity.score([pictures[1]], [pictures[0], blank], recogniser="miniature", face_choice="best")
    assert again.similarities == pytest.approx(found.similarities[:1])
    assert again.rejected == (("picture 2", "no face was found"),)
    assert "reference picture 2 left out" in identity.table(again, ["same"])
    said = identity.check("picture", pictures[1], pictures[0], recogniser="../../etc", face_choice="best")
    assert "apl-bad" in said and "Choose one of" in said  # only what the page offers, no path


def test_every_face_has_its_score(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group picture, with a recogniser that sees what it is told."""
    from apl_core.faces import Face

    def face(angle: float, edge: float) -> Face:
        return Face(np.array([0.0, 0.0, edge, edge]), 1.0, np.array([np.cos(angle), np.sin(angle)]))

    seen = {1: [face(0.0, 50)], 2: [face(1.5, 90), face(0.2, 30)], 3: []}
    embedder = types.SimpleNamespace(name="told", faces_of=lambda images: [seen[int(each[0, 0, 0])] for each in images])
    identity = host.ours("identity")
    monkeypatch.setattr(identity, "_loaded", lambda name, root: embedder)
    one, group, nobody = (np.full((4, 4, 3), number, np.uint8) for number in (1, 2, 3))
    found = identity.score([group, nobody, one], [one], 0.32, face_choice="all")
    assert found.as_dict()["per_face"] == [pytest.approx([0.07074, 0.98007], abs=1e-4), [], [1.0]]
    shown = identity.table(found, ["group", "nobody", "one"])
    assert "<td>group, face 1</td>" in shown and "<td>group, face 2</td>" in shown and "<td>one</td>" in shown
    assert shown.count("<tr>") == 4 and shown.count("· recognised") == 2 and shown.count("no face") == 1
    assert identity.score([group], [one], face_choice="largest").as_dict()["per_face"] == [[pytest.approx(0.07074)]]


def test_a_page_that_polls_does_not_hold_up_a_reload(host: Host) -> None:
    class Demo:
        closed, server = 0, types.SimpleNamespace(force_exit=False)

        def close(self) -> None:
            assert self.server.force_exit  # before the server is told to end, or it waits for the poll
            self.closed += 1

    demo = Demo()
    host.ours("register").let_go(demo)
    demo.close()
    assert demo.closed == 1
    host.ours("register").let_go(None)  # without a page


def test_the_score_route_refuses_what_is_no_picture(host: Host) -> None:
    scored = host.ours("api").scored
    for body, message in (([], "not an object"), ({"images": []}, "1 to 64"), ({"images": ["x"], "references": ["y"]},
                          "not a picture"), ({"imagse": []}, "not an object"),
                          ({"images": ["x"], "references": ["y"], "threshold": "low"}, "threshold is 'low'")):
        with pytest.raises(Exception, match=message):
            scored(body)


def test_nothing_third_party_is_imported_at_start(tmp_path: Path) -> None:
    heavy = ("gradio", "onnxruntime", "insightface", "cv2", "transformers", "diffusers", "fastapi", "starlette")
    before = {name for name in heavy if name in sys.modules}
    kept = {name: sys.modules.pop(name) for name in before}
    try:
        make_prefix(tmp_path / "prefixes")
        with fake_host("a1111", tmp_path):
            assert not [name for name in heavy if name in sys.modules]
    finally:
        sys.modules.update(kept)
