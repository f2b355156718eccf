"""The tab "Prefix transfer" in a small host: what it offers, what it writes, and whom it refuses."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_host import Host, word_id
from safetensors.torch import save_file
from test_webui_interface import gradio  # noqa: F401 - a fixture

from apl_core.prefix import load_prefix

TEXT = "text_model.embeddings.token_embedding.weight"
WIDTH_L, WIDTH_G = 96, 24


@pytest.fixture
def matrix(host: Host, tmp_path: Path) -> torch.Tensor:
    """[96, 24]; a checkpoint "one" and an XL one whose second table is the first one's times this."""
    g = torch.Generator().manual_seed(0)
    small, made = torch.randn(49408, WIDTH_L, generator=g), torch.randn(WIDTH_L, WIDTH_G, generator=g)
    save_file({f"cond_stage_model.transformer.{TEXT}": small}, str(tmp_path / "one.safetensors"))
    save_file({f"conditioner.embedders.0.transformer.{TEXT}": small,
               "conditioner.embedders.1.model.token_embedding.weight": small @ made}, str(tmp_path / "xl.safetensors"))
    files = {"one": "one.safetensors", "xl": "xl.safetensors", "old": "old.ckpt"}
    host.modules["modules.sd_models"].checkpoints_list = {
        name: types.SimpleNamespace(title=f"{file} [abc]", filename=str(tmp_path / file))
        for name, file in files.items()}
    host.shared.opts.data["sd_model_checkpoint"] = "xl.safetensors [abc]"
    return made


ASKED = ("test", "one.safetensors [abc]", "xl.safetensors [abc]", "auto", "")


def test_the_button_writes_a_prefix_for_xl(host: Host, matrix: torch.Tensor) -> None:
    carry = host.ours("carry")
    said = carry.pressed(*ASKED, "carried")
    assert "Saved as carried.safetensors" in said and "clip_l: copied" in said and "clip_g: ridge" in said, said
    made = load_prefix(host.ours("library").own_folder() / "carried.safetensors", enforce=True)
    assert made.family == "sdxl" and made.meta.title == "carried"
    assert torch.equal(made.vectors("clip_l"), host.prefix.vectors())
    cosine = torch.cosine_similarity(made.vectors("clip_g"), host.prefix.vectors() @ matrix, dim=1)
    assert float(cosine.min()) > 0.999
    assert "carried" in [entry.name for entry in host.ours("library").entries()]
    # the same again is no harm, another prefix under its name is refused
    assert "Saved as" in carry.pressed(*ASKED, "carried")
    assert "other vectors" in carry.pressed(*ASKED[:3], "procrustes", "", "carried")


def test_what_is_offered(host: Host, matrix: torch.Tensor, gradio: Any) -> None:  # noqa: F811
    carry = host.ours("carry")
    assert list(carry.checkpoints()) == ["one.safetensors [abc]", "xl.safetensors [abc]"]
    tabs = host.callbacks.fire("on_ui_tabs")[0]
    assert ("Prefix transfer", "apl_transfer_tab") in [each[1:] for each in tabs]
    built = {each.elem_id: each for each in gradio.built if getattr(each, "elem_id", None)}
    assert built["apl_transfer_to"].value == "xl.safetensors [abc]"
    assert "test" in built["apl_transfer_prefix"].choices
    refreshed = built["apl_transfer_refresh"].events[0]["fn"]()
    assert refreshed[1]["choices"] == list(carry.checkpoints())
    button = built["apl_transfer"].events[0]
    assert len(button["inputs"]) == 6 and button["fn"] is carry.pressed


def test_captions_choose_the_anchors(host: Host, matrix: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    carry = host.ours("carry")
    encoder = host.ours("models").encoders_of(host.ours("models").loaded_model())[0]
    monkeypatch.setattr(type(encoder), "tokenize", lambda _, texts: [[word_id(w) for w in t.split()] for t in texts],
                        raising=False)  # both hosts' encoders have it: ids of every text, without BOS and EOS
    assert "tokens are left" in carry.pressed(*ASKED[:4], "a dog", "few")
    words = "\n".join(f"{a}{b} {b}{a}" for a in "abcdefg" for b in "hijklmn")
    assert "Saved as" in carry.pressed(*ASKED[:4], words, "many")
    host.modules["modules.sd_models"].model_data.sd_model = None
    assert "no checkpoint is loaded" in carry.pressed(*ASKED[:4], words, "none")


@pytest.mark.parametrize(("values", "says"), [
    (("test", "nowhere", *ASKED[2:], "x"), "no .safetensors checkpoint"),
    ((*ASKED[:2], "old.ckpt [abc]", *ASKED[3:], "x"), "no .safetensors checkpoint"),
    ((*ASKED, "../x"), "separator"),
    ((*ASKED, ""), "empty"),
    (("missing", *ASKED[1:], "x"), "no prefix named"),
])
def test_what_is_refused(values: tuple[str, ...], says: str, host: Host, matrix: torch.Tensor) -> None:
    said = host.ours("carry").pressed(*values)
    assert "apl-bad" in said and says in said, said


def test_others_on_the_network_make_nothing(host: Host, matrix: torch.Tensor) -> None:
    host.shared.cmd_opts.listen = True
    assert "Others reach this WebUI" in host.ours("carry").pressed(*ASKED, "x")
    host.shared.cmd_opts.apl_allow_remote_train = True
    assert "Saved as" in host.ours("carry").pressed(*ASKED, "x")
