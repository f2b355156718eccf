"""State of the WebUI extension: caches, nested jobs, failures, arguments, and negative prompts that act as positive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_prefix
from fake_host import Host, fake_host
from safetensors import safe_open
from safetensors.torch import save_file

ON = (True, "test")


def carries(cond: torch.Tensor, prefix: torch.Tensor) -> bool:
    """Whether every chunk of 77 rows has the prefix after its first row."""
    return all(torch.equal(chunk[1:11], prefix) for chunk in cond.split(77))


def test_the_cache_knows_the_state(host: Host) -> None:
    prefix, seen = host.prefix.vectors(), []
    for args in ((), ON, (), ON, (True, "test", 400), ON):
        seen.append(host.job("a man", args=args).c[0][0])
    assert [carries(each, prefix) for each in seen] == [False, True, False, True, False, True]
    assert not torch.equal(seen[4], seen[0])


@pytest.mark.parametrize("shape", ["a1111", "forge"])
def test_hosts_whose_cache_has_no_key_for_it(shape: str, tmp_path: Path) -> None:
    prefix = make_prefix(tmp_path / "prefixes").vectors()
    with fake_host(shape, tmp_path, cached_params=False) as host:
        host.use(host.encoder())
        seen = [carries(host.job("a man", args=args).c[0][0], prefix) for args in ((), ON, (), ON)]
    assert seen == [False, True, False, True]


@pytest.mark.parametrize("outer", [True, False])
def test_a_nested_job_inherits(host: Host, outer: bool) -> None:
    inner = []
    # A detailer's job: its list of scripts leaves ours out, or has it with arguments of its own.
    host.job("a man", args=ON if outer else (False,), inside=lambda: inner.extend(
        [host.job("a face", scripts=False), host.job("a hand", args=(not outer, "test"))]))
    assert [carries(p.c[0][0], host.prefix.vectors()) for p in inner] == [outer, outer]
    assert ["APL" in p.extra_generation_params for p in inner] == [outer, outer]


def test_a_selected_scripts_own_jobs_inherit(host: Host) -> None:
    made = []

    def run(p):
        made.append(host.job("a man", scripts=False))
        made.append(host.job("a man", args=(False,)))  # a cell of a plot in which the plot says otherwise
        return

    host.runner.selected = run
    p = host.processing.StableDiffusionProcessing("a man", scripts=host.runner)
    host.runner.__class__ = host.modules["modules.scripts"].ScriptRunner
    host.runner.run(p, 0, True, "test", None)
    assert [carries(each.c[0][0], host.prefix.vectors()) for each in made] == [True, False]
    assert not carries(host.job("a man", scripts=False).c[0][0], host.prefix.vectors())


def test_state_is_gone_after_an_exception(host: Host) -> None:
    def fail() -> None:
        raise KeyError("another extension")

    with pytest.raises(KeyError):
        host.job("a man", args=ON, inside=fail)
    jobs = host.ours("jobs").JOBS
    assert jobs.current() is None and not jobs.stack
    assert not carries(host.job("a man").c[0][0], host.prefix.vectors())


def test_the_hosts_padding_is_never_prefixed(host: Host) -> None:
    sd_models = host.modules["modules.sd_models"]
    found = []
    host.job("a man", args=ON, inside=lambda: found.append(sd_models.get_empty_cond(sd_models.model_data.sd_model)))
    assert not carries(found[0][0], host.prefix.vectors())


@pytest.mark.parametrize("weights", [(1.0,), (0.0,), (-1.0,), (0.5, 0.5), (1.0, -1.0)])
@pytest.mark.parametrize("cfg", [7.0, 1.0, 0.5, 0.0, -1.0])
def test_the_negative_prompt_carries_it_where_it_acts_positively(host: Host, cfg: float, weights: tuple) -> None:
    prompt = " AND ".join(f"part{index} :{weight}" for index, weight in enumerate(weights))
    p = host.job(prompt, args=ON, negative_prompt="a man", cfg_scale=cfg)
    # u + s * sum(w (c - u)): what is left of u
    assert carries(p.uc[0][0], host.prefix.vectors()) == (1 - cfg * sum(weights) > 0)
    assert not carries(host.job(prompt, negative_prompt="a man", cfg_scale=cfg).uc[0][0], host.prefix.vectors())


def test_forges_hires_pass_has_its_own_guidance(host: Host) -> None:
    fields = {"negative_prompt": "a man", "enable_hr": True}
    for cfg, hr_cfg, hires in ((7.0, 0.5, "x"), (0.5, 7.0, "x"), (7.0, None, "x :0"), (0.5, None, "x")):
        p = host.job("x", args=ON, cfg_scale=cfg, hr_cfg=hr_cfg, hr_prompts=[hires], **fields)
        assert carries(p.uc[0][0], host.prefix.vectors()) == (cfg < 1)
        weight = 0 if ":0" in hires else 1
        assert carries(p.hr_uc[0][0], host.prefix.vectors()) == ((cfg if hr_cfg is None else hr_cfg) * weight < 1)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_guidance_that_is_no_number_is_refused(host: Host, scale: float) -> None:
    with pytest.raises(Exception, match="cfg is"):
        host.job("x", args=ON, cfg_scale=scale)


@pytest.mark.parametrize(("args", "message"), [
    (({"enabled": True, "prefx": "test"},), "unknown key 'prefx'"),
    (({"enabled": "yes"},), "enabled is 'yes'"),
    (({"enabled": 1},), "enabled is 1"),
    (({"enabled": True, "prefix": "absent"},), "no prefix named 'absent'"),
    (({"enabled": True, "prefix": "../test"},), "path separator"),
    (({"enabled": True, "prefix": 3},), "prefix is 3"),
    (({"enabled": True, "prefix": "test", "level": 7},), "no level 7"),
    (({"enabled": True, "prefix": "test", "level": "much"},), "level is 'much'"),
    ((True, "test", "step -1"), "level is"),
])
def test_wrong_arguments_are_named_and_nothing_is_generated(host: Host, args: tuple, message: str) -> None:
    with pytest.raises(Exception, match=message):
        host.job("a man", args=args)
    assert not host.ours("jobs").JOBS.stack


@pytest.mark.parametrize("args", [
    ({"enabled": True, "prefix": "test"},), (True, "test", "whole training"), (True, "test"), (True,),
    (True, None, None),
    ({"enabled": True, "prefix": "test", "level": None},),
])
def test_the_ways_to_say_on(host: Host, args: tuple) -> None:
    p = host.job("a man", args=args)
    assert carries(p.c[0][0], host.prefix.vectors())
    assert p.extra_generation_params["APL"] == f"test [{host.prefix.content_hash[:8]}]"


def test_a_level_is_another_prefix_and_the_infotext_says_so(host: Host) -> None:
    for level in (400, "400", "step 400", 400.0):
        p = host.job("a man", args=({"enabled": True, "prefix": "test", "level": level},))
        assert p.extra_generation_params["APL"].endswith("], level 400")


def test_infotext_comes_back(host: Host) -> None:
    args = host.ours("args")
    p = host.job("a man", args=(True, "test", 400))
    found = args.from_infotext(p.extra_generation_params["APL"])
    assert (found[0], found[2]) == ("test", 400)
    for text in ("", "test", "test [xyz]", "test [0123abcd], level x", None, 3):
        assert args.from_infotext(text) is None


@pytest.mark.parametrize(("family", "key", "width", "message"), [
    ("sd2", "clip_l", 96, "not supported"), ("sd3", "clip_l", 96, "not supported"), ("other", "clip_l", 96, "not supp"),
    ("sdxl", "clip_l", 96, "is for Stable Diffusion 1"), ("sd1", "clip_l", 64, "width 96"),
])
def test_models_that_do_not_fit_are_refused_while_it_is_on(host: Host, family: str, key: str, width: int,
                                                           message: str) -> None:
    host.use(host.encoder(width, key), family=family)
    with pytest.raises(Exception, match=message):
        host.job("a man", args=ON)
    host.job("a man")  # off: the model is nobody's business


def test_a_model_without_a_known_encoder_is_refused(host: Host) -> None:
    model = host.use(host.encoder())
    for name in ("cond_stage_model", "text_processing_engine_l"):
        model.__dict__.pop(name, None)
    with pytest.raises(Exception, match="no text encoder"):
        host.job("a man", args=ON)


def test_an_unknown_host_refuses_instead_of_going_on(tmp_path: Path) -> None:
    make_prefix(tmp_path / "prefixes")
    with fake_host("none", tmp_path) as host:
        assert "None of the text encoders" in host.ours("jobs").JOBS.problem
        assert "not supported: None of the text encoders" in host.ours("state").state_line(True, "test", None)
        p = host.job("a man", args=ON)
        assert host.shared.state.interrupted and p.c is None
        assert "nothing was generated" in p.comments[0]
        host.shared.state.interrupted = False
        host.use(object())
        p = host.processing.StableDiffusionProcessing("a man")
        host.runner.alwayson_scripts[0].process(p, False, "test", None)
        assert not host.shared.state.interrupted


def test_broken_files_are_told_in_a_line_and_the_rest_works(host: Host) -> None:
    folder = host.folder / "prefixes"
    (folder / "cut.safetensors").write_bytes((folder / "test.safetensors").read_bytes()[:200])
    (folder / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    (folder / "huge.safetensors").write_bytes((1 << 30).to_bytes(8, "little") + b"{}")
    rows = torch.ones(10, 96)
    with safe_open(folder / "test.safetensors", "pt") as held:
        said = held.metadata()
    for name, tensors in (("nan", {"emb_params": torch.full_like(rows, float("nan"))}),
                          ("extra", {"emb_params": rows, "more": rows.clone()}),
                          ("narrow", {"emb_params": torch.ones(10, 64)})):
        save_file(tensors, folder / f"{name}.safetensors", said)
    listed = {each["name"]: each for each in host.ours("api").prefixes()}
    assert listed["test"]["fits"] and listed["test"]["levels"] == [400]
    for name in ("cut", "pickle", "huge", "nan", "extra", "narrow"):
        assert not listed[name]["fits"] and listed[name]["reason"] and "\n" not in listed[name]["reason"]
        with pytest.raises(Exception, match=r"cut off|pickle|claims a header|NaN|more|emb_params: 64"):
            host.job("a man", args=(True, name))
    assert carries(host.job("a man", args=ON).c[0][0], host.prefix.vectors())


def test_an_unknown_name_tells_what_there_is_and_not_where(host: Host) -> None:
    with pytest.raises(Exception, match=r"no prefix named 'none'.*anonymize-miniature, .*test") as raised:
        host.job("a man", args=(True, "none"))
    assert str(host.folder) not in str(raised.value) and "embeddings" not in str(raised.value)
    with pytest.raises(Exception, match="No prefix is chosen") as raised:
        host.ours("library").load("", None)
    assert str(host.folder) not in str(raised.value)


def test_settings_and_default_on_switch_it_on(host: Host) -> None:
    host.shared.opts.data["apl_default_enabled"] = True
    assert carries(host.job("a man").c[0][0], host.prefix.vectors())
    assert not carries(host.job("a dog", args=(False,)).c[0][0], host.prefix.vectors())


def test_axes_of_the_plot_change_one_cell_at_a_time(host: Host) -> None:
    xyz = host.ours("xyz")
    p = host.processing.StableDiffusionProcessing("a man", scripts=host.runner, script_args=(0, False, "test", None))
    xyz._apply("enabled")(p, "True", ["True"])
    host.processing.process_images_inner(p)
    assert carries(p.c[0][0], host.prefix.vectors())
    xyz._apply("level")(p, "step 400", [])
    host.processing.process_images_inner(p)
    assert p.extra_generation_params["APL"].endswith("level 400")
    xyz._apply("enabled")(p, "False", [])
    host.processing.process_images_inner(p)
    assert "APL" not in p.extra_generation_params
    with pytest.raises(Exception, match="enabled is 'maybe'"):
        xyz._apply("enabled")(p, "maybe", [])
