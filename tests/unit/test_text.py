"""The text states are what CLIP's formulas say, with the prefix in its place; compared by hand and with diffusers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from fakes import tiny_models as tiny
from torch import Tensor
from torch.nn import functional as F

from apl_core.errors import ConfigError, ModelError, PlacementError, PrefixFileError
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt
from apl_train.model.text import TextStack

transformers = pytest.importorskip("transformers")

# In double precision no mistake can hide behind rounding; transformers 4 builds its mask in single precision only.
DOUBLE = int(transformers.__version__.split(".")[0]) >= 5
DTYPE, TOLERANCE = (torch.float64, 1e-12) if DOUBLE else (torch.float32, 2e-6)

WIDTH, M = 32, 3
PROMPTS = ["a cat on a mat", "photo of k"]
LONG = "abcdefgh " * 17  # 136 tokens, one a letter


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def padding_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer_2"), "!")


@pytest.fixture(scope="module")
def sd1(tokenizer) -> TextStack:
    return TextStack("sd1", {"emb_params": tokenizer}, {"emb_params": tiny.text_encoder().to(DTYPE)})


@pytest.fixture(scope="module")
def sdxl(tokenizer, padding_tokenizer) -> TextStack:
    return TextStack("sdxl", {"clip_l": tokenizer, "clip_g": padding_tokenizer}, {
        "clip_l": tiny.text_encoder(5).to(DTYPE),
        "clip_g": tiny.text_encoder(6, 48, 4, 6, "gelu", 2, projection=40).to(DTYPE),
    })


def rows(m: int = M, width: int = WIDTH, seed: int = 9) -> Tensor:
    return torch.randn(m, width, generator=torch.Generator().manual_seed(seed))


def by_hand(encoder, embeddings: Tensor, heads: int, act: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """CLIP's forward from its weights: token embeddings [B, 77, W] -> every hidden state, then the normed last one."""
    w = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    layers = len({key.split(".")[2] for key in w if key.startswith("encoder.layers.")})
    b, n, width = embeddings.shape

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def split(x: Tensor) -> Tensor:
        return x.view(b, n, heads, width // heads).transpose(1, 2)

    x = embeddings + w["embeddings.position_embedding.weight"][:n]
    states = [x]
    causal = torch.full((n, n), -torch.inf).triu(1)
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        y = norm(x, f"{layer}.layer_norm1")
        q, k, v = (split(linear(y, f"{layer}.self_attn.{part}_proj")) for part in "qkv")
        scores = q @ k.transpose(-1, -2) * (width // heads) ** -0.5 + causal
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, width)
        x = x + linear(y, f"{layer}.self_attn.out_proj")
        y = act(linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1"))
        x = x + linear(y, f"{layer}.mlp.fc2")
        states.append(x)
    return [*states, norm(x, "final_layer_norm")]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def inner(encoder):
    return getattr(encoder, "text_model", encoder)


def table(encoder) -> Tensor:
    return next(value for key, value in encoder.state_dict().items() if key.endswith("token_embedding.weight"))


def laid_out(encoder, vectors: Tensor, chunks: Sequence[Sequence[int]], pad: int = tiny.EOS) -> Tensor:
    """BOS, the vectors, the tokens, EOS, padding: token embeddings [chunks, 77, W], concatenated by hand."""
    embedding = table(encoder)
    one = []
    for tokens in chunks:
        tail = [*tokens, tiny.EOS] + [pad] * (75 - len(vectors) - len(tokens))
        one.append(torch.cat([embedding[[tiny.BOS]], vectors, embedding[tail]]))
    return torch.stack(one)


def close(a: Tensor, b: Tensor) -> bool:
    # transformers' fused attention (sdpa) and layer norm sum in another order than the formulas: not equal to the bit
    assert a.shape == b.shape and a.dtype == DTYPE
    return float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max())


def test_prefix_stands_after_bos_as_by_hand(sd1: TextStack) -> None:
    encoder, vectors = sd1.encoders["emb_params"], rows()
    found = sd1.encode(PROMPTS, {"emb_params": vectors})
    expected = by_hand(encoder, laid_out(encoder, vectors, [sd1.tokenize(p) for p in PROMPTS]), 4, quick_gelu)[-1]
    assert found.pooled is None and found.states.shape == (2, 77, WIDTH)
    assert close(found.states, expected)
    assert not torch.allclose(found.states, sd1.encode(PROMPTS).states, atol=1e-2)


def test_vectors_of_real_tokens_equal_the_tokens_to_the_bit(sd1: TextStack) -> None:
    ids = sd1.tokenize("abc")
    found = sd1.encode(["xyz"], {"emb_params": sd1.embedding_table()[ids].clone()})
    assert torch.equal(found.states, sd1.encode(["abc xyz"]).states)
    plain = sd1.encoders["emb_params"](torch.tensor([[tiny.BOS, *ids, *sd1.tokenize("xyz"), *[tiny.EOS] * 70]]))
    assert torch.equal(found.states, plain.last_hidden_state)


def test_without_vectors_it_is_transformers_own_forward(sd1: TextStack, tokenizer) -> None:
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(sd1.encode(PROMPTS).states, sd1.encoders["emb_params"](ids).last_hidden_state)
    assert torch.equal(sd1.encode([""]).states, sd1.encoders["emb_params"](
        tokenizer([""], padding="max_length", return_tensors="pt").input_ids).last_hidden_state)


def test_single_precision_is_as_near_as_its_rounding(tokenizer) -> None:
    encoder, vectors = tiny.text_encoder(), rows()
    stack = TextStack("sd1", {"emb_params": tokenizer}, {"emb_params": encoder})
    found = stack.encode(["abc"], {"emb_params": vectors})
    tokens = tokenizer("abc", add_special_tokens=False).input_ids
    expected = by_hand(encoder, laid_out(encoder, vectors, [tokens]), 4, quick_gelu)[-1]
    assert found.states.dtype == torch.float32
    assert float((found.states - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_every_chunk_of_a_long_prompt_carries_the_prefix(sd1: TextStack) -> None:
    encoder, vectors, tokens = sd1.encoders["emb_params"], rows(), sd1.tokenize(LONG)
    room = 75 - M
    found = sd1.encode([LONG, "k"], {"emb_params": vectors})
    assert found.states.shape == (2, 154, WIDTH) and sd1.chunks_of(LONG, M) == 2 and sd1.chunks_of("k", M) == 1
    parts = [tokens[:room], tokens[room:], sd1.tokenize("k"), []]
    expected = by_hand(encoder, laid_out(encoder, vectors, parts), 4, quick_gelu)[-1]
    assert close(found.states, expected.view(2, 154, WIDTH))


def test_chunks_pads_with_prefixed_empty_chunks(sd1: TextStack) -> None:
    vectors = {"emb_params": rows()}
    found = sd1.encode(["k"], vectors, chunks=3).states
    empty = sd1.encode([""], vectors).states
    assert close(found[:, 77:154], empty) and close(found[:, 154:], empty)
    with pytest.raises(PlacementError, match="takes 2 chunks"):
        sd1.encode([LONG], vectors, chunks=1)


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_of_sd1_norms_an_earlier_layer(sd1: TextStack, tokenizer, skip: int) -> None:
    encoder, vectors = sd1.encoders["emb_params"], rows()
    states = by_hand(encoder, laid_out(encoder, vectors, [sd1.tokenize(p) for p in PROMPTS]), 4, quick_gelu)
    earlier = states[:-1][-skip]
    expected = F.layer_norm(earlier, (WIDTH,), inner(encoder).final_layer_norm.weight,
                            inner(encoder).final_layer_norm.bias)
    assert close(sd1.encode(PROMPTS, {"emb_params": vectors}, clip_skip=skip).states, expected)


@pytest.mark.parametrize("skip", [0, 4, True, 1.0])
def test_clip_skip_out_of_range(sd1: TextStack, skip: object) -> None:
    with pytest.raises(ConfigError, match="allows 1 to 3"):
        sd1.encode(["k"], clip_skip=skip)


@pytest.mark.parametrize("skip", [1, 2])
def test_sdxl_without_prefix_is_diffusers_encode_prompt(sdxl: TextStack, skip: int) -> None:
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    encoders, tokenizers = sdxl.encoders, sdxl.tokenizers
    pipe = StableDiffusionXLPipeline(tiny.vae(), encoders["clip_l"], encoders["clip_g"], tokenizers["clip_l"],
                                     tokenizers["clip_g"], tiny.unet(), DDIMScheduler(), add_watermarker=False)
    prompts = [*PROMPTS, "", "what! a mat"]
    states, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False,
                                              clip_skip=None if skip == 1 else skip - 1)
    found = sdxl.encode(prompts, clip_skip=skip)
    assert torch.equal(found.states, states) and found.states.shape == (4, 77, 80)
    # transformers projects the same rows
    assert torch.equal(found.pooled, pooled) and found.pooled.shape == (4, 40)


def test_sdxl_prefix_and_pooled_as_by_hand(sdxl: TextStack) -> None:
    vectors = {"clip_l": rows(), "clip_g": rows(width=48)}
    found = sdxl.encode([*PROMPTS, LONG], vectors)
    room = 75 - M
    ids = [sdxl.tokenize(p) for p in PROMPTS] + [sdxl.tokenize(LONG)[:room]]
    states = {}
    for key, heads, act, pad in (("clip_l", 4, quick_gelu, tiny.EOS), ("clip_g", 6, F.gelu, 0)):
        encoder = sdxl.encoders[key]
        states[key] = by_hand(encoder, laid_out(encoder, vectors[key], ids, pad), heads, act)
    assert found.states.shape == (3, 154, 80)
    assert close(found.states[:, :77], torch.cat([states["clip_l"][-3], states["clip_g"][-3]], -1))
    eos = torch.tensor([1 + M + len(tokens) for tokens in ids])
    last = states["clip_g"][-1][torch.arange(3), eos]
    assert close(found.pooled, last @ sdxl.encoders["clip_g"].text_projection.weight.T)


def test_plain_pooled_is_that_of_the_prompt_alone(sdxl: TextStack) -> None:
    vectors = {key: rows(width=width) for key, width in sdxl.widths.items()}
    usual, bare = sdxl.encode(PROMPTS, vectors), sdxl.encode(PROMPTS)
    sdxl.plain_pooled = True
    try:
        found = sdxl.encode(PROMPTS, vectors)
    finally:
        sdxl.plain_pooled = False
    assert torch.equal(found.states, usual.states)
    assert torch.equal(found.pooled, bare.pooled) and not torch.equal(found.pooled, usual.pooled)


@pytest.mark.parametrize("eos", [2, tiny.EOS])
def test_pooled_stands_at_eos_whatever_the_config_says(tokenizer, padding_tokenizer, eos: int) -> None:
    large = tiny.text_encoder(6, eos=eos, projection=16).to(DTYPE)
    stack = TextStack("sdxl", {"clip_l": tokenizer, "clip_g": padding_tokenizer},
                      {"clip_l": tiny.text_encoder(5).to(DTYPE), "clip_g": large})
    vectors = {"clip_l": rows(), "clip_g": rows()}
    own: list[Tensor] = []
    large.register_forward_hook(lambda _module, _args, out: own.append(out.text_embeds))
    pooled = stack.encode(PROMPTS, vectors).pooled
    assert torch.equal(own[0], pooled)  # prefix rows cannot be taken for EOS by transformers either
    embedded = laid_out(large, rows(), [stack.tokenize(p) for p in PROMPTS], pad=0)
    last = by_hand(large, embedded, 4, quick_gelu)[-1]
    expected = torch.stack([last[i, 1 + M + len(stack.tokenize(p))] for i, p in enumerate(PROMPTS)])
    assert close(pooled, expected @ large.text_projection.weight.T)


def test_exclamation_marks_may_take_another_chunk_in_clip_g(sdxl: TextStack) -> None:
    prompt = "!! " * 40
    assert [len(sdxl.tokenizers[key](prompt).input_ids) for key in ("clip_l", "clip_g")] == [42, 82]
    assert sdxl.encode([prompt, "k"]).states.shape == (2, 154, 80) and sdxl.chunks_of(prompt) == 2


def test_gradient_reaches_the_vectors_and_nothing_else(sdxl: TextStack) -> None:
    vectors = {"clip_l": rows().requires_grad_(), "clip_g": rows(width=48).requires_grad_()}
    out = sdxl.encode([LONG, "k"], vectors)
    out.states.square().sum().backward()
    for key, vector in vectors.items():
        assert bool(vector.grad.abs().sum(1).gt(0).all())
        assert all(p.grad is None and not p.requires_grad for p in sdxl.encoders[key].parameters())
    assert sdxl.encode(["k"]).states.grad_fn is None


@pytest.mark.skipif(not DOUBLE, reason="finite differences need double precision")
def test_gradient_is_that_of_finite_differences(tokenizer) -> None:
    stack = TextStack("sd1", {"emb_params": tokenizer}, {"emb_params": tiny.text_encoder(3).to(DTYPE)})
    weight = torch.randn(1, 77, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(vectors: Tensor) -> Tensor:
        return (stack.encode(["a cat"], {"emb_params": vectors}).states * weight).sum()

    vectors = rows().double().requires_grad_()
    loss(vectors).backward()
    step = torch.zeros_like(vectors)
    step[1, 7] = 1e-5
    with torch.no_grad():
        slope = (loss(vectors + step) - loss(vectors - step)) / 2e-5
    assert float(slope) == pytest.approx(float(vectors.grad[1, 7]), rel=1e-6)


def test_the_encoder_is_left_as_it_was(sd1: TextStack) -> None:
    before = sd1.encode(PROMPTS).states
    embedding = inner(sd1.encoders["emb_params"]).embeddings.token_embedding
    sd1.encode(PROMPTS, {"emb_params": rows()})
    layer = inner(sd1.encoders["emb_params"]).encoder.layers[0]
    breaks = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sd1.encode(PROMPTS, {"emb_params": rows()})
    breaks.remove()
    assert not embedding._forward_hooks and torch.equal(sd1.encode(PROMPTS).states, before)


def test_a_loaded_prefix_brings_its_own_placement(sd1: TextStack) -> None:
    vectors = rows()
    made = AnonymizationPrompt("sd1", {"emb_params": vectors}, PrefixMetadata(placement="suffix"))
    found = sd1.encode(["abc"], made).states
    assert torch.equal(found, sd1.encode(["abc"], {"emb_params": vectors}, position="suffix").states)
    assert not torch.equal(found, sd1.encode(["abc"], made, position="prefix").states)
    embedding = sd1.embedding_table()
    placed = torch.cat([embedding[[tiny.BOS, *sd1.tokenize("abc")]], vectors, embedding[[tiny.EOS] * 70]])
    assert close(found, by_hand(sd1.encoders["emb_params"], placed[None], 4, quick_gelu)[-1])


def test_tokenize_neither_cuts_nor_warns(tmp_path: Path, recwarn) -> None:
    fresh = tiny.write_tokenizer(tmp_path)  # a tokenizer warns once
    stack = TextStack("sd1", {"emb_params": fresh}, {"emb_params": tiny.text_encoder()})
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")  # hands nothing on to the root logger
    logger.addHandler(handler)
    try:
        tokens = stack.tokenize("ab " * 200)
        stack.encode(["ab " * 200], {"emb_params": rows()})
        assert not said and not recwarn.list
        fresh("ab " * 200)
        assert "longer than" in said[0]  # so the test would have heard it
    finally:
        logger.removeHandler(handler)
    assert len(tokens) == 400 and tokens[:2] == [1, 258] and tiny.BOS not in tokens


@pytest.mark.parametrize(
    ("vectors", "field", "words"),
    [
        ({}, "emb_params", "no tensor emb_params"),
        ({"emb_params": torch.zeros(3, 768)}, "emb_params", r"\[3, 768\]; this model's text encoder is 32 wide"),
        ({"emb_params": torch.zeros(32)}, "emb_params", r"\[32\]"),
        ({"emb_params": torch.zeros(0, 32)}, "emb_params", r"\[0, 32\]"),
        ({"emb_params": torch.zeros(3, 32), "clip_g": torch.zeros(3, 48)}, "clip_g", "no text encoder"),
    ],
)
def test_wrong_vectors_are_refused(sd1: TextStack, vectors: dict, field: str, words: str) -> None:
    with pytest.raises(PrefixFileError, match=words) as caught:
        sd1.encode(["k"], vectors)
    assert caught.value.field == field and "emb_params: 32" in caught.value.hint


def test_sdxl_needs_as_many_rows_for_both(sdxl: TextStack) -> None:
    with pytest.raises(PrefixFileError, match="different numbers") as caught:
        sdxl.encode(["k"], {"clip_l": rows(2), "clip_g": rows(3, 48)})
    assert caught.value.field == "num_tokens"
    with pytest.raises(PrefixFileError, match="no tensor clip_g"):
        sdxl.encode(["k"], {"clip_l": rows()})


def test_wrong_encoders_are_refused(tokenizer) -> None:
    small = tiny.text_encoder()
    with pytest.raises(ModelError, match="sd1 and sdxl"):
        TextStack("sd2", {"emb_params": tokenizer}, {"emb_params": small})
    with pytest.raises(ModelError, match="encoders has clip_l"):
        TextStack("sd1", {"emb_params": tokenizer}, {"clip_l": small})
    with pytest.raises(ModelError, match="no projection"):
        TextStack("sdxl", {"clip_l": tokenizer, "clip_g": tokenizer}, {"clip_l": small, "clip_g": small})


def test_tables_and_widths(sd1: TextStack, sdxl: TextStack) -> None:
    assert sd1.widths == {"emb_params": 32} and sdxl.widths == {"clip_l": 32, "clip_g": 48}
    assert torch.equal(sd1.embedding_table(), table(sd1.encoders["emb_params"]))
    assert sdxl.embedding_table("clip_g").shape == (49408, 48)
    with pytest.raises(ModelError, match="several"):
        sdxl.embedding_table()


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_prompts_are_a_list(sd1: TextStack, prompts: object) -> None:
    with pytest.raises(ConfigError) as caught:
        sd1.encode(prompts)
    assert caught.value.field == "prompts"
