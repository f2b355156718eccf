"""Every item of the WebUI's text encoding, on fakes of both shapes whose conditioning is the rows they were given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_prefix
from fake_host import BOS, EOS, Host, Inversion, SdConditioning, fake_host, word_id

ON = (True, "test")


def rows(prompt: str, prefix: torch.Tensor | None, count: int = 10, width: int = 96) -> torch.Tensor:
    """[77 * chunks, width] by hand, for prompts of plain words and BREAK: the fake's rows are its ids."""
    room, chunks = 75 - (count if prefix is not None else 0), []
    for part in prompt.split("BREAK"):
        ids = [word_id(word) for word in part.split()]
        chunks += [ids[at : at + room] for at in range(0, max(1, len(ids)), room)]
    out = []
    for ids in chunks:
        body = torch.tensor([BOS, *[0] * (75 - room), *ids, *[EOS] * (76 - (75 - room) - len(ids))]).float()
        line = body[:, None].expand(-1, width).clone()
        if prefix is not None:
            line[1 : 1 + count] = prefix
        out.append(line)
    return torch.cat(out)


@pytest.mark.parametrize("prompt", [
    "", "a man", *(" ".join(["cat"] * count) for count in (65, 66, 75, 76, 130, 131, 200)),
    "a man BREAK " + " ".join(["dog"] * 70) + " BREAK b",
], ids=lambda prompt: f"{len(prompt.split())} words")
def test_every_chunk_carries_the_prefix(host: Host, prompt: str) -> None:
    on, off = host.job(prompt, args=ON), host.job(prompt)
    assert torch.equal(on.c[0][0], rows(prompt, host.prefix.vectors()))
    assert torch.equal(off.c[0][0], rows(prompt, None))
    assert torch.equal(on.uc[0][0], rows("", None))


def test_a_batch_gets_its_empty_chunks_with_the_prefix(host: Host) -> None:
    jobs = host.ours("jobs")
    model, long = host.modules["modules.sd_models"].model_data.sd_model, " ".join(["cat"] * 100)
    with jobs.JOBS.job(jobs.Choice("test", None, host.prefix)):
        found = model.get_learned_conditioning(["a man", long])
    want = torch.cat([rows("a man", host.prefix.vectors()), rows("", host.prefix.vectors())])
    assert torch.equal(found[0], want)
    assert torch.equal(found[1], rows(long, host.prefix.vectors()))


def test_inversions_move_with_their_words(host: Host) -> None:
    encoder = host.encoder()
    host.use(encoder)
    vec = torch.full((3, 96), -5.0)
    encoder._database().known[word_id("me")] = Inversion("me", vec)
    on = host.job("a photo of me now", args=ON).c[0][0]
    assert torch.equal(on[1:11], host.prefix.vectors())
    assert torch.equal(on[14:17], vec)
    assert on[17, 0] == word_id("now")
    assert torch.equal(host.job("a photo of me now").c[0][0][4:7], vec)


def test_an_inversion_of_a_whole_chunk_is_cut_to_the_room(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    encoder = host.encoder()
    host.use(encoder)
    vec = torch.arange(75.0)[:, None].expand(-1, 96)
    encoder._database().known[word_id("big")] = inversion = Inversion("big", vec)
    if host.shape == "forge":
        del inversion.shorthash  # Forge's have none
    on = host.job("a big cat", args=ON).c[0][0]
    assert on.shape[0] == 77 * 3
    assert torch.equal(on[77 + 11 : 77 + 76], vec[:65])
    assert "75 vectors" in caplog.text
    assert torch.equal(host.job("a big cat").c[0][0][78:153], vec)


def test_the_prefix_weighs_one(host: Host) -> None:
    encoder = host.encoder()
    host.use(encoder)
    p = host.processing.StableDiffusionProcessing("(red) cat", negative_prompt="")
    p.scripts, p.script_args = host.runner, (0, *ON, None)
    host.processing.process_images_inner(p)
    # The positive prompt is encoded last.
    assert encoder.seen_multipliers[0] == [1.0] * 11 + [1.4] + [1.0] * 65


def test_negative_prompts_stay_plain_and_unlabelled_text_does_not(host: Host) -> None:
    jobs, model = host.ours("jobs"), host.modules["modules.sd_models"].model_data.sd_model
    with jobs.JOBS.job(jobs.Choice("test", None, host.prefix)), jobs.JOBS.conditions(jobs.Conditioning(negative=False)):
        negative = model.get_learned_conditioning(SdConditioning(["ugly"], True))
        unlabelled = model.get_learned_conditioning(["ugly"])
    assert torch.equal(negative[0], rows("ugly", None))
    assert torch.equal(unlabelled[0], rows("ugly", host.prefix.vectors()))


@pytest.mark.parametrize("placement", ["suffix", "both"])
@pytest.mark.parametrize("shape", ["a1111", "forge"])
def test_other_placements_stand_where_the_plan_says(shape: str, placement: str, tmp_path: Path) -> None:
    prefix = make_prefix(tmp_path / "prefixes", placement=placement).vectors()
    with fake_host(shape, tmp_path) as host:
        encoder = host.encoder()
        host.use(encoder)
        encoder._database().known[word_id("me")] = Inversion("me", torch.full((2, 96), -5.0))
        on = host.job("a me cat", args=ON).c[0][0]
    ahead = {"suffix": 0, "both": 5}[placement]
    assert torch.equal(on[1 : 1 + ahead], prefix[:ahead])
    assert torch.equal(on[1 + ahead, :1], torch.tensor([float(word_id("a"))]))
    assert torch.equal(on[2 + ahead : 4 + ahead], torch.full((2, 96), -5.0))
    assert torch.equal(on[5 + ahead : 5 + 10], prefix[ahead:])
    assert on[15, 0] == EOS


@pytest.mark.parametrize("shape", ["a1111", "forge"])
def test_sdxl_gets_each_encoders_own_rows(shape: str, tmp_path: Path) -> None:
    prefix = make_prefix(tmp_path / "prefixes", family="sdxl", widths={"clip_l": 64, "clip_g": 80})
    with fake_host(shape, tmp_path) as host:
        host.use(host.encoder(64, "clip_l"), host.encoder(80, "clip_g"), family="sdxl")
        found = host.job("a man", args=ON).c[0]
        assert torch.equal(found[0][0][1:11], prefix.vectors("clip_l"))
        assert torch.equal(found[1][0][1:11], prefix.vectors("clip_g"))
        host.use(host.encoder(80, "clip_g"), family="sdxl")  # the refiner
        assert torch.equal(host.job("a dog", args=ON).c[0][0][1:11], prefix.vectors("clip_g"))


def test_forges_list_of_inversions_does_not_name_the_prefix(tmp_path: Path) -> None:
    make_prefix(tmp_path / "prefixes")
    with fake_host("forge", tmp_path) as host:
        encoder = host.encoder()
        host.use(encoder)
        listed = host.modules["backend.text_processing.classic_engine"].last_extra_generation_params
        host.job("a man", args=ON)
        assert "TI" not in listed
        encoder._database().known[word_id("me")] = Inversion("me", torch.zeros(2, 96))
        host.job("a photo of me", args=ON)
        assert listed["TI"] == "me"


def test_the_old_emphasis_option_cannot_go_around(tmp_path: Path) -> None:
    make_prefix(tmp_path / "prefixes")
    with fake_host("a1111", tmp_path) as host:
        host.use(host.encoder())
        host.shared.opts.data["use_old_emphasis_implementation"] = True
        found = host.job("a man", args=ON).c[0][0]
        assert torch.equal(found, rows("a man", make_prefix(tmp_path / "again").vectors()))
        assert host.shared.opts.data["use_old_emphasis_implementation"] is True


def test_a_missing_prefix_fails_the_job(host: Host) -> None:
    encoder = host.encoder()
    host.use(encoder)
    kind, cut = type(encoder), type(encoder).tokenize_line
    cutter = kind.__mro__[-2] if host.shape == "forge" else kind.__mro__[2]
    kind.tokenize_line = cutter.tokenize_line  # another extension's own, which never asks ours
    try:
        with pytest.raises(Exception, match=r"chunk|without the anonymization prompt"):
            host.job("a man", args=ON)
    finally:
        kind.tokenize_line = cut
    assert host.ours("jobs").JOBS.counters["refused"] >= 1
    assert not host.ours("jobs").JOBS.stack
    assert torch.equal(host.job("b").c[0][0], rows("b", None))


def test_an_encode_that_bypasses_process_tokens_is_seen_at_the_embedding_layer(host: Host) -> None:
    encoder = host.encoder()
    host.use(encoder)
    kind = type(encoder)
    kept = kind.process_tokens

    def own(self, tokens, multipliers):
        holder = getattr(self, "hijack", None) or self.embeddings
        holder.fixes = [[] for _ in tokens]
        return self.layer(torch.tensor([[BOS] + [EOS] * 76 for _ in tokens]))

    kind.process_tokens = own
    try:
        with pytest.raises(Exception, match="Rows without"):
            host.job("a man", args=ON)
    finally:
        kind.process_tokens = kept


def test_reloading_scripts_wraps_nothing_twice(host: Host) -> None:
    hooks = host.ours("register").HOOKS
    kind = type(host.encoder())
    before, first = len(hooks.placed), kind.process_tokens
    host.load()  # the host runs the file again without telling
    assert kind.process_tokens is first
    assert len(hooks.placed) == before
    for _ in range(3):
        host.callbacks.fire("on_script_unloaded")
        host.load()
    assert torch.equal(host.job("a man", args=ON).c[0][0], rows("a man", host.prefix.vectors()))
    depth, function = 0, kind.process_tokens
    while hasattr(function, "__wrapped__"):
        depth, function = depth + 1, function.__wrapped__
    assert depth == 1


def test_unloading_leaves_the_host_as_it_was(host: Host) -> None:
    encoder = host.encoder()
    host.use(encoder)
    host.callbacks.fire("on_script_unloaded")
    kind = type(encoder)
    assert "chunk_length" not in {name for base in kind.__mro__ for name in vars(base)}
    assert encoder.chunk_length == 75
    assert not any(hasattr(getattr(kind, name), "apl_hook") for name in ("tokenize_line", "process_tokens"))


def test_counting_tokens_in_another_thread_sees_the_full_room(host: Host) -> None:
    import threading

    encoder, seen = host.encoder(), []
    host.use(encoder)
    encoder_module = host.ours("encoder")
    jobs = host.ours("jobs")
    choice = jobs.Choice("test", None, host.prefix)
    with encoder_module.opened(encoder_module.Scope(encoder_module.injection_for(choice, encoder), counting=True)):
        assert encoder.chunk_length == 65
        assert encoder.get_target_prompt_token_count(70) == 130
        thread = threading.Thread(target=lambda: seen.append(encoder.get_target_prompt_token_count(70)))
        thread.start()
        thread.join()
    assert seen == [75]
