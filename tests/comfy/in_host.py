"""The checks that run inside ComfyUI: `python in_host.py COMFYUI_DIR REPOSITORY`, in the host's own interpreter.

Every function named check_* is one check; what it raises is what failed. The last line printed is JSON: name to
{"problem", "detail"}. Text encoders are the host's own classes with random weights, CLIP-L 32 wide and CLIP-G 48 wide,
so every number that is compared comes out of the host's own code.

References know nothing of ours: the host's CLIP Text Encode; its own `embedding:` syntax; and chunks laid out by hand
(`by_hand`), encoded by the untouched CLIP, emphasis worked out here.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import math
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

HOST, ROOT, WRITING = Path(sys.argv[1]), Path(sys.argv[2]), "--write-locales" in sys.argv
sys.path.insert(0, str(Path(__file__).parent))
START, END = 49406, 49407
WIDTH_L, WIDTH_G, M = 32, 48, 10


def start_host() -> None:
    """Import the host as its main.py does, on the CPU. torchvision and torchaudio may lack a build for this torch."""
    import run_host

    start_host.kept = run_host.fill_in()
    sys.path.insert(0, str(HOST))
    sys.argv = ["main.py", "--cpu", "--base-directory", str(SCRATCH), "--disable-api-nodes",
                "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import nodes  # noqa: F401


SCRATCH = Path(tempfile.mkdtemp(prefix="apl-comfy-"))
EMBEDDINGS = SCRATCH / "models" / "embeddings"
OWN = SCRATCH / "models" / "anonymization_prompts"
for made in (EMBEDDINGS, OWN, SCRATCH / "custom_nodes", SCRATCH / "input", SCRATCH / "output", SCRATCH / "temp"):
    made.mkdir(parents=True, exist_ok=True)
start_host()

import comfy.sd  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
import workflow_files  # noqa: E402
from comfy import sd1_clip, supported_models_base  # noqa: E402
from locale_texts import texts  # noqa: E402

PACK = str(ROOT).replace(".", "_x_")
_start = time.process_time()
assert asyncio.run(nodes.load_custom_node(str(ROOT))), "ComfyUI refused the pack"
LOADING = time.process_time() - _start
patch = sys.modules[f"{PACK}.comfy_nodes.clip_patch"]
core = {name: sys.modules[f"{PACK}.apl_core.{name}"] for name in ("errors", "prefix", "metadata")}
NODES = nodes.NODE_CLASS_MAPPINGS


def clip(kind: str, seed: int = 0):
    """A CLIP of the host's own classes, small and random: "sd1", "sdxl", "refiner" or "t5" (SD1's with a T5 beside)."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4}
    options = {
        "clip_l_model_config": sizes | {"hidden_size": WIDTH_L, "intermediate_size": 64},
        "clip_g_model_config": sizes | {"hidden_size": WIDTH_G, "intermediate_size": 96},
    }
    classes = {
        "sd1": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        "refiner": (comfy.sdxl_clip.SDXLRefinerTokenizer if hasattr(comfy.sdxl_clip, "SDXLRefinerTokenizer")
                    else RefinerTokenizer, comfy.sdxl_clip.SDXLRefinerClipModel),
    }[kind]
    target = supported_models_base.ClipTarget(*classes)
    made = comfy.sd.CLIP(target, embedding_directory=[str(EMBEDDINGS)],
                         model_options=options | {"dtype": torch.float32})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(made.cond_stage_model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


class RefinerTokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None) -> None:
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, clip_name="g",
                         tokenizer=comfy.sdxl_clip.SDXLClipGTokenizer)


def prefix(kind: str, seed: int = 1, title: str = "test prefix", **meta):
    """A random prefix as it comes from its file; the file stands in both folders, as "ap-KIND"."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"sd1": {"emb_params": WIDTH_L}, "sdxl": {"clip_l": WIDTH_L, "clip_g": WIDTH_G}}[kind]
    tensors = {key: torch.randn(M, width, generator=generator) for key, width in widths.items()}
    made = core["prefix"].AnonymizationPrompt(kind, tensors, core["metadata"].PrefixMetadata(title=title, **meta))
    for folder in (EMBEDDINGS, OWN):
        core["prefix"].save_prefix(made, folder / f"ap-{kind}.safetensors")
    return core["prefix"].load_prefix(OWN / f"ap-{kind}.safetensors")


SD1, SDXL, AP1, AP2 = clip("sd1"), clip("sdxl"), prefix("sd1"), prefix("sdxl")
ON1, ON2 = (NODES["APL_Anonymize"].execute(c, p, True, "chunk").args[0] for c, p in ((SD1, AP1), (SDXL, AP2)))
SHORT = "a photo of a person in a garden"
LONG = ", ".join(f"a photo of person number {n} in the garden" for n in "abcdefghijklmnopqrstuvw")


def encoded(clip_, text: str):
    """(states [1, 77 * chunks, width], pooled) through the host's own CLIP Text Encode node."""
    (cond, extra), = NODES["CLIPTextEncode"]().encode(clip_, text)[0]
    return cond.clone(), extra["pooled_output"].clone()


def same(seen, wanted, what: str) -> None:
    for part, a, b in zip(("states", "pooled"), seen, wanted, strict=True):
        assert a.shape == b.shape, f"{what}: {part} {tuple(a.shape)}, wanted {tuple(b.shape)}"
        assert torch.equal(a, b), f"{what}: {part} differ by {float((a - b).abs().max()):.3g}"


def differ(a, b) -> None:
    assert a[0].shape != b[0].shape or float((a[0] - b[0]).abs().max()) > 0.01, "the prefix does nothing"


def ids(clip_, key: str, text: str) -> list[int]:
    """The words' ids, by the vocabulary alone."""
    return getattr(clip_.tokenizer, key).tokenizer(text)["input_ids"][1:-1]


def by_hand(words: list, rows, pad: int, room: int) -> list[list[tuple]]:
    """Chunks of (token, weight): start, prefix, up to `room` words, end, padding. Each word an id or (id, weight)."""
    words = [word if isinstance(word, tuple) else (word, 1.0) for word in words]
    parts = [words[at : at + room] for at in range(0, max(1, len(words)), room)]
    chunks = [[(START, 1.0), *((row, 1.0) for row in rows), *part, (END, 1.0)] for part in parts]
    return [chunk + [(pad, 1.0)] * (77 - len(chunk)) for chunk in chunks]


def reference(clip_, words: dict[str, list], rows: dict, pads: dict):
    """Hand-made chunks through the untouched CLIP's encoder: the host applies no weights, they are applied here."""
    chunks = {key: by_hand(words[key], rows[key], pads[key], 75 - len(rows[key])) for key in words}
    plain = {key: [[(token, 1.0) for token, _ in chunk] for chunk in value] for key, value in chunks.items()}
    cond, pooled = clip_.encode_from_tokens(plain, return_pooled=True)
    empty, _ = clip_.encode_from_tokens({key: by_hand([], rows[key], pads[key], 75) for key in words},
                                        return_pooled=True)
    cond = cond.clone()
    at = 0
    for key in sorted(words, reverse=True):  # "l" before "g", as the host puts them side by side
        width = WIDTH_L if key == "l" else WIDTH_G
        for number, chunk in enumerate(chunks[key]):
            for position, (_, weight) in enumerate(chunk):
                if weight != 1.0:
                    z, z0 = cond[0, number * 77 + position, at : at + width], empty[0, position, at : at + width]
                    z.copy_((z - z0) * weight + z0)
        at += width
    return cond, pooled


def reference1(words, ap=AP1, clip_=SD1):
    return reference(clip_, {"l": words}, {"l": list(ap.vectors())}, {"l": END})


def reference2(text: str, ap=AP2, clip_=SDXL):
    keys = {"l": "clip_l", "g": "clip_g"}
    return reference(clip_, {k: ids(clip_, v, text) for k, v in keys.items()},
                     {k: list(ap.vectors(v)) for k, v in keys.items()}, {"l": END, "g": 0})


# -- the pack


def check_pack_is_loaded() -> str:
    """Nodes are there under their ids; nothing heavy came along; the folder is known with its extension."""
    import folder_paths

    ours = {name for name in NODES if name.startswith("APL_")}
    assert {"APL_LoadAnonymizationPrompt", "APL_Anonymize"} <= ours, ours
    assert str(ROOT / "web") in nodes.EXTENSION_WEB_DIRS.values(), nodes.EXTENSION_WEB_DIRS
    heavy = {"diffusers", "insightface", "onnxruntime", "gradio"} & set(sys.modules)
    assert not heavy, heavy
    assert folder_paths.folder_names_and_paths["anonymization_prompts"][1] == {".safetensors"}
    assert "ap-sd1.safetensors" in folder_paths.get_filename_list("anonymization_prompts")
    assert LOADING < 5.0
    return f"loaded in {LOADING * 1e3:.0f} ms of CPU time"


def check_every_input_has_a_tooltip_and_a_help_page() -> None:
    for name in [name for name in NODES if name.startswith("APL_")]:
        info = NODES[name].GET_NODE_INFO_V1()
        assert info["category"] == "conditioning/anonymize", name
        assert info["description"], name
        groups = [group for kind, group in info["input"].items() if kind != "hidden"]
        for group in groups:
            for key, (_, options) in ((key, value) for key, value in group.items() if len(value) == 2):
                assert options.get("tooltip"), f"{name}.{key} has no tooltip"
        page = ROOT / "web" / "docs" / f"{name}.md"
        assert page.is_file() and len(page.read_text("utf-8")) > 400, f"{page.name} is missing or nearly empty"
        text = page.read_text("utf-8")
        assert f"]({name}.png)" in text and page.with_suffix(".png").is_file(), f"{page.name} has no picture"
        for group in groups:
            for key, value in group.items():
                shown = value[1].get("display_name", key) if len(value) == 2 else key
                assert f"`{shown}`" in text, f"{page.name} says nothing of {shown}"


# -- off


def check_no_output_has_an_inputs_id() -> None:
    """Older hosts refuse a whole pack for one such node."""
    for each in pack_schemas():
        assert not {entry.id for entry in each.inputs} & {entry.id for entry in each.outputs}, each.node_id


def check_off_is_the_hosts_own_object() -> None:
    assert NODES["APL_Anonymize"].execute(SD1, AP1, False, "chunk").args[0] is SD1


def check_the_given_clip_stays_plain() -> None:
    """Base and anonymized in turn, both kinds: no leak, in either direction."""
    for base, on in ((SD1, ON1), (SDXL, ON2)):
        before = encoded(base, SHORT)
        first = encoded(on, SHORT)
        same(encoded(base, SHORT), before, "plain after anonymized")
        same(encoded(on, SHORT), first, "anonymized after plain")
        differ(first, before)


# -- on, against the host's own means


def check_one_chunk_equals_the_hosts_embedding_syntax() -> None:
    same(encoded(ON1, SHORT), encoded(SD1, f"embedding:ap-sd1 {SHORT}"), "SD1")
    same(encoded(ON2, SHORT), encoded(SDXL, f"embedding:ap-sdxl {SHORT}"), "SDXL")


def check_empty_prompt_carries_the_prefix() -> None:
    same(encoded(ON1, ""), reference1([]), "SD1")
    same(encoded(ON2, ""), reference2(""), "SDXL")


def check_chunk_edges() -> None:
    """65 words fill a chunk, the 66th opens the next; the host's own words, one token each."""
    for count, chunks in ((1, 1), (64, 1), (65, 1), (66, 2), (130, 2), (131, 3)):
        text = " ".join(["garden"] * count)
        words = ids(SD1, "clip_l", text)
        assert len(words) == count
        seen = encoded(ON1, text)
        assert seen[0].shape[1] == 77 * chunks, (count, seen[0].shape)
        same(seen, reference1(words), f"{count} words")


def check_several_chunks_equal_the_hand_made_list() -> None:
    words = ids(SD1, "clip_l", LONG)
    assert len(words) > 170
    same(encoded(ON1, LONG), reference1(words), "SD1")
    same(encoded(ON2, LONG), reference2(LONG), "SDXL")


def check_weights_act_on_the_users_words_only() -> None:
    """Emphasis is measured from an empty prompt that carries the prefix too."""
    words = [(word, 1.4) for word in ids(SD1, "clip_l", "a person")] + ids(SD1, "clip_l", "in a garden")
    same(encoded(ON1, "(a person:1.4) in a garden"), reference1(words), "1.4")
    words = [(word, 0.0) for word in ids(SD1, "clip_l", "a person")] + ids(SD1, "clip_l", "in a garden")
    same(encoded(ON1, "(a person:0) in a garden"), reference1(words), "0")


def check_weights_over_several_chunks() -> None:
    """A weighted word in the third chunk; groups of up to seven tokens stay together, as everywhere in the host."""
    first = ids(SD1, "clip_l", " ".join(["garden"] * 140))
    words = first + [(word, 1.3) for word in ids(SD1, "clip_l", "a person")]
    same(encoded(ON1, " ".join(["garden"] * 140) + " (a person:1.3)"), reference1(words), "third chunk")


def check_a_word_is_not_cut_by_the_prefix() -> None:
    """64 words and a group of three: the group goes to the next chunk whole, behind the prefix."""
    group = ids(SD1, "clip_l", "a photo of")
    chunk = ids(SD1, "clip_l", " ".join(["garden"] * 64))
    seen = ON1.tokenize(" ".join(["garden"] * 64) + " (a photo of:1.2)")["l"]
    assert [token for token, _ in seen[0][11:75]] == chunk and seen[0][75][0] == END
    assert list(seen[1][11:14]) == [(word, 1.2) for word in group]


def check_a_textual_inversion_beside_the_prefix() -> None:
    import safetensors.torch

    rows = torch.randn(2, WIDTH_L, generator=torch.Generator().manual_seed(5))
    safetensors.torch.save_file({"emb_params": rows}, str(EMBEDDINGS / "style.safetensors"))
    words = [*((row, 1.0) for row in rows), *ids(SD1, "clip_l", "a garden")]
    same(encoded(ON1, "embedding:style a garden"), reference1(words), "textual inversion")


def check_clip_skip_before_and_after() -> None:
    for layer in (-1, -2, -3):
        after, before, base = ON1.clone(), SD1.clone(), SD1.clone()
        for skipped in (after, before, base):
            skipped.clip_layer(layer)
        before = patch.anonymize(before, AP1)
        wanted = reference1(ids(SD1, "clip_l", LONG), clip_=base)
        same(encoded(after, LONG), wanted, f"{layer} after")
        same(encoded(before, LONG), wanted, f"{layer} before")


def check_lora_before_and_after() -> None:
    key = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    change = torch.randn(64, WIDTH_L, generator=torch.Generator().manual_seed(6)) * 0.3

    def with_lora(clip_):
        made = clip_.clone()
        assert made.add_patches({key: ("diff", (change,))}, 1.0), "the key does not exist"
        return made

    wanted = reference1(ids(SD1, "clip_l", LONG), clip_=with_lora(SD1))
    same(encoded(patch.anonymize(with_lora(SD1), AP1), LONG), wanted, "LoRA, then Anonymize")
    same(encoded(with_lora(ON1), LONG), wanted, "Anonymize, then LoRA")
    differ(wanted, encoded(ON1, LONG))


def check_sdxl_node_pads_with_chunks_that_carry_the_prefix() -> None:
    extras = asyncio.run(_extras("nodes_clip_sdxl.py"))
    made = extras["CLIPTextEncodeSDXL"].execute(ON2, 64, 64, 0, 0, 64, 64, LONG, SHORT).args[0]
    (cond, extra), = made
    rows = {"l": list(AP2.vectors("clip_l")), "g": list(AP2.vectors("clip_g"))}
    g = by_hand(ids(SDXL, "clip_g", LONG), rows["g"], 0, 65)
    l_chunks = by_hand(ids(SDXL, "clip_l", SHORT), rows["l"], END, 65)
    l_chunks += by_hand([], rows["l"], END, 65) * (len(g) - len(l_chunks))
    same((cond, extra["pooled_output"]), SDXL.encode_from_tokens({"l": l_chunks, "g": g}, return_pooled=True), "SDXL")


async def _extras(name: str) -> dict:
    import importlib

    module = importlib.import_module(f"comfy_extras.{name.removesuffix('.py')}")
    return {node.GET_SCHEMA().node_id: node for node in await (await module.comfy_entrypoint()).get_node_list()}


def check_the_refiner_takes_the_second_encoders_rows() -> None:
    refiner = clip("refiner")
    wanted = reference(refiner, {"g": ids(refiner, "clip_g", LONG)}, {"g": list(AP2.vectors("clip_g"))}, {"g": 0})
    same(encoded(patch.anonymize(refiner, AP2), LONG), wanted, "refiner")


def scheduled() -> list[tuple]:
    """(states, pooled) of `LONG` by ON1 under a hook whose LoRA has the strength 0, then 1; and the LoRA's change."""
    import comfy.hooks

    key = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    change = torch.randn(64, WIDTH_L, generator=torch.Generator().manual_seed(6)) * 0.3
    made = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    for hook in made.hooks:
        hook.weights, hook.weights_clip, hook.need_weight_init = {}, {key: ("diff", (change,))}, False
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
    made.set_keyframes_on_hooks(keyframes)
    hooked = NODES_EXTRA["SetClipHooks"]().apply_hooks(ON1, schedule_clip=True, apply_to_conds=False, hooks=made)[0]
    found = hooked.encode_from_tokens_scheduled(hooked.tokenize(LONG), show_pbar=False)
    return [(cond, extra["pooled_output"]) for cond, extra in found]


def check_a_scheduled_encode_carries_the_prefix() -> None:
    first, second = scheduled()
    wanted = reference1(ids(SD1, "clip_l", LONG))
    same(first, wanted, "strength 0")
    differ(second, wanted)
    same(encoded(ON1, LONG), wanted, "afterwards")


class _Lazily(dict):
    def __missing__(self, name: str):
        import comfy_extras.nodes_hooks as hooks

        return next(value for key, value in hooks.NODE_CLASS_MAPPINGS.items() if key == name)


NODES_EXTRA = _Lazily()


# -- twice, and another


def check_twice_is_once() -> None:
    for on, ap in ((ON1, AP1), (ON2, AP2)):
        twice = patch.anonymize(on, ap)
        for text in ("", SHORT, LONG, "(a person:1.4) in a garden"):
            same(encoded(twice, text), encoded(on, text), text[:20])


def check_another_prefix_takes_the_place_of_the_first() -> None:
    other = prefix("sd1", seed=9, title="other")
    prefix("sd1")
    seen = encoded(patch.anonymize(ON1, other), "(a person:1.4) in a garden")
    same(seen, encoded(patch.anonymize(SD1, other), "(a person:1.4) in a garden"), "replaced")
    differ(seen, encoded(ON1, "(a person:1.4) in a garden"))


def check_other_placements() -> None:
    rows = AP1.vectors()
    words = ids(SD1, "clip_l", SHORT)
    for where, head, tail in (("suffix", [], list(rows)), ("both", list(rows[:5]), list(rows[5:]))):
        ap = core["prefix"].AnonymizationPrompt("sd1", AP1.tensors, AP1.meta.with_fields(placement=where))
        row = [START, *head, *words, *tail, END]
        row = [(token, 1.0) for token in row + [END] * (77 - len(row))]
        on = patch.anonymize(SD1, ap)
        same(encoded(on, SHORT), SD1.encode_from_tokens({"l": [row]}, return_pooled=True), where)
        same(encoded(patch.anonymize(on, ap), SHORT), encoded(on, SHORT), f"{where} twice")


# -- tokens that other packs make


def check_foreign_tokens_get_the_prefix() -> None:
    words = ids(SD1, "clip_l", SHORT)
    row = [(START, 1.0), *((word, 1.0) for word in words), (END, 1.0)]
    row += [(END, 1.0)] * (77 - len(row))
    same(ON1.encode_from_tokens({"l": [row]}, return_pooled=True), reference1(words), "foreign tokens")
    ON1.load_model()
    same(ON1.cond_stage_model.clip_l.encode_token_weights([row]), reference1(words), "the encoder called directly")


def check_full_foreign_chunks_are_refused_or_trimmed() -> None:
    words = ids(SD1, "clip_l", " ".join(["garden"] * 75))
    row = [(token, 1.0) for token in (START, *words, END)]
    refused(lambda: ON1.encode_from_tokens({"l": [row]}), "75 tokens", "65")
    trimming = NODES["APL_Anonymize"].execute(SD1, AP1, True, "trim").args[0]
    same(trimming.encode_from_tokens({"l": [row]}, return_pooled=True), reference1(words[:65]), "trim")
    refused(lambda: ON1.encode_from_tokens({"l": [row[1:-1]]}), "without a start and an end")


# -- overflow


def check_overflow_trim_and_error() -> None:
    trimming, stopping = (NODES["APL_Anonymize"].execute(SD1, AP1, True, how).args[0] for how in ("trim", "error"))
    words = ids(SD1, "clip_l", LONG)
    same(encoded(trimming, LONG), reference1(words[:65]), "trim")
    same(encoded(trimming, SHORT), encoded(ON1, SHORT), "trim, short")
    same(encoded(stopping, SHORT), encoded(ON1, SHORT), "error, short")
    refused(lambda: encoded(stopping, LONG), str(len(words)), "65 fit", "Shorten")


# -- refusals


def refused(call, *says: str) -> str:
    try:
        call()
    except core["errors"].APLError as error:
        assert error.hint, "no way out is named"
        assert all(part in str(error) for part in says), f"{error} lacks one of {says}"
        return str(error)
    raise AssertionError(f"not refused; wanted {says}")


def check_wrong_models_are_refused_with_a_sentence() -> None:
    refused(lambda: patch.anonymize(SDXL, AP1), "clip_g", "has nothing for")
    refused(lambda: patch.anonymize(SD1, AP2), "made for a model with clip_g, clip_l")
    wide = core["prefix"].AnonymizationPrompt("sd1", {"emb_params": torch.randn(10, 768)}, AP1.meta)
    refused(lambda: patch.anonymize(SD1, wide), "768", "32 wide")
    many = core["prefix"].AnonymizationPrompt("sd1", {"emb_params": torch.randn(64, WIDTH_L)}, AP1.meta)
    assert patch.anonymize(SD1, many) is not SD1
    refused(lambda: patch.anonymize(SD1, AP1, "wrap"), "overflow", "chunk, trim, error")
    refused(lambda: patch.anonymize(types.SimpleNamespace(tokenizer=None), AP1), "no text encoder")


def check_a_t5_beside_the_encoders_is_refused() -> None:
    """Flux and SD3 read the prompt with a T5 too, by which the likeness would come back."""
    beside = SD1.clone()
    beside.tokenizer = types.SimpleNamespace(clip_l=SD1.tokenizer.clip_l, t5xxl=SD1.tokenizer.clip_l)
    refused(lambda: patch.anonymize(beside, AP1), "t5xxl", "not supported")
    only = SD1.clone()
    only.tokenizer = types.SimpleNamespace(t5xxl=SD1.tokenizer.clip_l)
    refused(lambda: patch.anonymize(only, AP1), "t5xxl")


# -- what other packs look at


def check_what_other_packs_read_stays() -> None:
    tokenizer = ON1.tokenizer.clip_l
    assert tokenizer.max_length == 77 and tokenizer.tokens_start == 1
    assert isinstance(tokenizer, sd1_clip.SDTokenizer) and "tokenize_with_weights" not in vars(tokenizer)
    assert isinstance(ON2.cond_stage_model, comfy.sdxl_clip.SDXLClipModel)
    chunks = ON1.tokenize("(a person:1.4) in a garden", return_word_ids=True)["l"]
    assert [len(chunk) for chunk in chunks] == [77]
    assert all(entry[1:] == (1.0, 0) and torch.is_tensor(entry[0]) for entry in chunks[0][1:11])
    assert [entry[2] for entry in chunks[0][11:16]] == [1, 1, 2, 2, 2], chunks[0][11:16]
    names = ON1.tokenizer.untokenize(chunks[0][:14])
    assert [name for _, name in names[1:11]] == [""] * 10 and names[0][1] == "<|startoftext|>"


# -- files, through the host's own graph execution


class Source:
    """Test nodes in the host's older manner: a CLIP from nowhere, and a place for a conditioning to end in."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (SD1,)


class Sink:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True
    seen: list = []  # noqa: RUF012 - read by the checks

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def run(self, conditioning):
        Sink.seen.append(conditioning)
        return {}


class Server:
    """As much of the host's server as its executor talks to."""

    client_id = last_node_id = None

    def __init__(self) -> None:
        self.messages = []
        self.sockets_metadata = {}

    def send_sync(self, event, data, sid=None) -> None:
        self.messages.append((event, data))


NODES["TestSource"], NODES["TestSink"] = Source, Sink


def graph(text: str, name: str = "ap-sd1", level: int = 0, enabled: bool = True) -> dict:
    return {
        "1": {"class_type": "TestSource", "inputs": {}},
        "2": {"class_type": "APL_LoadAnonymizationPrompt", "inputs": {"prompt_name": name, "level": level}},
        "3": {"class_type": "APL_Anonymize", "inputs": {"clip": ["1", 0], "anonymization_prompt": ["2", 0],
                                                        "enabled": enabled, "overflow": "chunk"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["3", 0], "text": text}},
        "5": {"class_type": "TestSink", "inputs": {"conditioning": ["4", 0]}},
    }


def validated(prompt: dict) -> tuple:
    import execution

    return asyncio.run(execution.validate_prompt("id", prompt, None))


def check_the_host_runs_the_graph_and_runs_it_again_when_the_file_changes() -> None:
    import execution

    sizes = {"cache_args": {"ram": 0, "ram_inactive": 0, "lru": 0}}  # 0.3.64 has no such parameter
    known = inspect.signature(execution.PromptExecutor).parameters
    executor = execution.PromptExecutor(Server(), **{key: value for key, value in sizes.items() if key in known})
    text = "a photo of a graph"

    def run():
        count = len(Sink.seen)
        valid, error, outputs, _ = validated(graph(text))
        assert valid, error
        executor.execute(graph(text), "id", {}, outputs)
        assert executor.success, executor.status_messages
        return Sink.seen[count:]

    prefix("sd1")
    (first,) = run()
    same((first[0][0], first[0][1]["pooled_output"]), reference1(ids(SD1, "clip_l", text)), "graph")
    assert run() == [], "nothing changed, yet it ran again"
    other = prefix("sd1", seed=11)
    (second,) = run()
    same((second[0][0], second[0][1]["pooled_output"]), reference1(ids(SD1, "clip_l", text), other), "changed file")
    prefix("sd1")


def check_bad_files_are_one_line_on_the_node() -> None:
    (OWN / "broken.safetensors").write_bytes(b"\x80\x02not this")
    for name, level, says in (("broken", 0, "not a safetensors file"), ("nobody", 0, "no prefix named"),
                              ("../ap-sd1", 0, "path separator"), ("ap-sd1", 7, "no level 7")):
        valid, error, _, problems = validated(graph("x", name, level))
        shown = json.dumps(problems)
        assert not valid and error["type"] == "prompt_outputs_failed_validation", (name, error)
        assert says in shown and "custom_validation_failed" in shown, shown
    (OWN / "broken.safetensors").unlink()


def check_levels() -> None:
    low = core["prefix"].AnonymizationPrompt("sd1", {"emb_params": AP1.vectors() * 0.5}, AP1.meta)
    core["prefix"].save_prefix(low, OWN / "ap-sd1.step-200.safetensors")
    load = NODES["APL_LoadAnonymizationPrompt"]
    options = load.GET_NODE_INFO_V1()["input"]["required"]["prompt_name"]
    listed = options[0] if isinstance(options[0], list) else options[1]["options"]
    assert "ap-sd1" in listed and "ap-sd1.step-200" not in listed, listed
    assert load.execute("ap-sd1", 200).args[0].content_hash == low.content_hash
    assert load.execute("ap-sd1", 0).args[0].content_hash == AP1.content_hash
    assert load.fingerprint_inputs("ap-sd1", 200) != load.fingerprint_inputs("ap-sd1", 0)


# -- files of prefixes, pictures and scores


def check_inspect_says_what_is_known() -> None:
    ap = core["prefix"].AnonymizationPrompt(
        "sd1", AP1.tensors, AP1.meta.with_fields(level=200, steps=1000, alpha=2.0, scores={"id_acc_mean": 0.04}))
    out = NODES["APL_InspectAnonymizationPrompt"].execute(ap)
    text, digest = out.args
    assert digest == AP1.content_hash and out.ui.as_dict()["text"] == (text,)
    for part in ("test prefix", "Stable Diffusion 1.x (emb_params: 32)", "10; 65 of a chunk's 75 tokens",
                 "after 200 of 1000 steps", "alpha: 2", "id_acc_mean", digest):
        assert part in text, f"{part} is not in\n{text}"


def check_save_and_load_again() -> None:
    save, load = NODES["APL_SaveAnonymizationPrompt"], NODES["APL_LoadAnonymizationPrompt"]
    path = Path(save.execute(AP1, "kept", "A new title", False).args[0])
    assert path == OWN / "kept.safetensors"
    again = load.execute("kept", 0).args[0]
    assert again.content_hash == AP1.content_hash and again.name == "A new title"
    save.execute(AP1, "kept.safetensors", "", False)  # the same vectors may be written again
    other = core["prefix"].AnonymizationPrompt("sd1", {"emb_params": AP1.vectors() * 2}, AP1.meta)
    refused(lambda: save.execute(other, "kept", "", False), "there already", "overwrite")
    assert load.execute("kept", 0).args[0].content_hash == AP1.content_hash
    save.execute(other, "kept", "", True)
    assert load.execute("kept", 0).args[0].content_hash == other.content_hash
    for name in ("../kept", "", "a/b", "con"):
        assert save.validate_inputs(name) is not True, name
        refused(lambda name=name: save.execute(AP1, name, "", True), "prefix name")
    path.unlink()


def check_compare_puts_every_pair_where_it_belongs() -> None:
    off = torch.stack([torch.full((40, 50, 3), value) for value in (0.0, 0.2, 0.4)])
    on = off + 0.5
    (grid,) = NODES["APL_CompareGrid"].execute(off, on, 2, "off", "on").args
    high, wide = 40 + 24, 100  # a caption above, two pictures side by side
    assert grid.shape == (1, 2 * high + 4, 2 * wide + 4, 3) and grid.dtype == torch.float32, grid.shape
    for index, (row, column) in enumerate(((0, 0), (0, 1), (1, 0))):
        y, x = row * (high + 4) + 24 + 20, column * (wide + 4)
        for shift, value in ((25, off[index, 0, 0, 0]), (75, on[index, 0, 0, 0])):
            assert abs(float(grid[0, y, x + shift, 0]) - float(value)) <= 1 / 255, (index, shift)
    refused(lambda: NODES["APL_CompareGrid"].execute(off, on[:2], 2, "", ""), "3 pictures of 50 x 40", "2 pictures")


def check_scores_by_hand() -> None:
    """A recogniser whose features are read off the pictures: similarities are known, one picture has no face."""
    import numpy as np

    module = sys.modules[f"{PACK}.comfy_nodes.nodes_score"]
    identity = sys.modules[f"{PACK}.apl_core.identity"]

    class Recogniser:
        name, sha256 = "by hand", "0"

        def faces_of(self, images):
            return [self.faces(image) for image in images]

        def faces(self, image):
            angle = float(image[0, 0, 0]) / 255
            vector = np.array([np.cos(angle), np.sin(angle)], np.float32)
            return [] if image[0, 0, 1] else [identity.Face((4, 4, 20, 20), 0.9, vector)]

    def pictures(*angles):
        made = torch.zeros(len(angles), 32, 32, 3)
        for picture, angle in zip(made, angles, strict=True):
            picture[..., 0], picture[..., 1] = (0.0, 1.0) if angle is None else (angle, 0.0)
        return made

    real, module._loaded = module._loaded, lambda name, root: Recogniser()
    try:
        execute = NODES["APL_IdentityScore"].execute
        drawn, mean, top, rate, passed, report = execute(pictures(0.2, 1.0, None), pictures(0.0), "x", 0.8).args
        wanted = [np.cos(round(angle * 255) / 255) for angle in (0.2, 1.0)]
        assert abs(mean - np.mean(wanted)) < 1e-6 and abs(top - max(wanted)) < 1e-6, (mean, top, wanted)
        assert abs(rate - 2 / 3) < 1e-9 and passed is False and drawn.shape == (3, 56, 32, 3)
        assert "faces in 2 of 3 pictures; 1 recognised" in report and "2: no face" in report, report
        assert execute(pictures(1.0), pictures(0.0, 0.1), "x", 0.8).args[4] is True
        assert execute(pictures(None), pictures(0.0), "x", 0.8).args[4] is False, "no face is no success"
        refused(lambda: execute(pictures(1.0), pictures(None), "x", 0.8, strict=True), "exactly one face", "reference")
        goes_on = execute(pictures(1.0), pictures(None), "x", 0.8).args
        assert torch.equal(goes_on[0], pictures(1.0)) and goes_on[4] is False, "what cannot be scored has not passed"
        assert all(np.isnan(value) for value in goes_on[1:4]) and "Nothing was scored" in goes_on[5], goes_on[5]
        assert execute(pictures(0.2), pictures(0.0), "x", 0.8, "all").args[1] == execute(
            pictures(0.2), pictures(0.0), "x", 0.8, "best").args[1]
        import comfy.model_management as management

        management.interrupt_current_processing(True)
        try:
            execute(pictures(1.0), pictures(0.0), "x", 0.8)
            raise AssertionError("it went on although the user interrupted")
        except management.InterruptProcessingException:
            pass
    finally:
        module._loaded = real


def check_a_missing_recogniser_names_the_command() -> None:
    try:
        import insightface  # noqa: F401
    except ImportError:
        wanted = "pip install insightface onnxruntime"
    else:
        wanted = "not-there"
    image = torch.zeros(1, 32, 32, 3)
    execute = NODES["APL_IdentityScore"].execute
    refused(lambda: execute(image, image, "not-there", 0.3, strict=True), wanted)
    passed_on = execute(image, image, "not-there", 0.3).args  # a queue of comparisons goes on without it
    assert torch.equal(passed_on[0], image) and wanted in passed_on[5] and passed_on[4] is False, passed_on[5]


# -- example workflows


def check_example_workflows_are_valid() -> None:
    """But for the names of files, which are the user's: there the host's own list is put in."""
    from PIL import Image

    paths = workflow_files.paths()
    assert len(paths) >= 4
    NODES.update(asyncio.run(_extras("nodes_clip_sdxl.py")))
    (SCRATCH / "models" / "checkpoints").mkdir(exist_ok=True)
    (SCRATCH / "models" / "checkpoints" / "mini.safetensors").write_bytes(b"")
    Image.new("RGB", (32, 32)).save(SCRATCH / "input" / "example.png")
    used = set()
    for path in paths:
        prompt = workflow_files.prompt_of(path, ckpt_name="mini.safetensors", prompt_name="ap-sd1",
                                          from_checkpoint="mini.safetensors", to_checkpoint="mini.safetensors")
        valid, error, outputs, problems = validated(prompt)
        assert valid and not problems, f"{path.name}: {error} {problems}"
        assert len(outputs) >= 1
        used |= {node["class_type"] for node in prompt.values()}
        assert path.with_suffix(".jpg").is_file(), f"{path.name} has no thumbnail"
    ours = {name for name in NODES if name.startswith("APL_")}
    assert ours <= used, f"in no example workflow: {ours - used}"


def check_a_workflow_names_every_input_of_its_nodes() -> None:
    """Values are saved by place: an input that came in between would take its neighbour's."""
    NODES.update(asyncio.run(_extras("nodes_clip_sdxl.py")))
    for path in workflow_files.paths():
        for node in workflow_files.prompt_of(path).values():
            info = NODES[node["class_type"]].INPUT_TYPES()
            known = [key for kind in ("required", "optional") for key in info.get(kind, {})]
            given = [key for key in node["inputs"] if key != "upload"]
            links = [key for key in known if isinstance(node["inputs"].get(key), list)]
            assert sorted(given) == sorted(known), (path.name, node["class_type"], given, known)
            widgets = [key for key in given if key not in links]
            assert widgets == [key for key in known if key not in links], (path.name, node["class_type"], widgets)


# -- words


def pack_schemas() -> list:
    return [node.GET_SCHEMA() for name, node in NODES.items() if name.startswith("APL_")]


def check_locales_are_what_the_nodes_say() -> None:
    for name, text in texts(pack_schemas()).items():
        path = ROOT / "locales" / "en" / name
        assert path.read_text("utf-8") == text, f"{path.name} is old: run tests/comfy/write_locales.py"


def check_the_preview_counts_tokens_as_the_hosts_tokenizer_does() -> None:
    execute = NODES["APL_PreviewEncodedText"].execute
    for text in ("", "a photo of a dog", "garden " * 65, "garden " * 66, "(a person:1.4) in a garden " * 12):
        for given, room in ((SD1, 75), (ON1, 65)):
            report = execute(given, text).args[0]
            words = len(SD1.tokenizer.clip_l.tokenizer(text.replace("(", "").replace(":1.4)", ""))["input_ids"]) - 2
            used = [int(line.split(": ")[1].split("/")[0]) for line in report.splitlines()[1:]]
            assert sum(used) == words and max(used) <= room, (text, report)
            assert len(used) == len(given.tokenize(text)["l"])
            assert ("no prefix" in report) is (given is SD1)
    both = execute(ON2, "a dog").args[0]
    assert "clip_l: 1 chunk, 10 prefix vectors" in both and "clip_g: 1 chunk" in both and "a dog" in both, both
    assert "(a person:1.4) in a garden" in execute(ON1, "(a person:1.4) in a garden").args[0]


# -- cost


def check_cost() -> str:
    """CPU time of an encode with the prefix beside one without, at equal chunks; least of 15, in turn by 5."""
    text = " ".join(["garden"] * 60)
    least = {}
    for _ in range(3):
        for name, clip_ in (("without", SD1), ("with", ON1)):
            encoded(clip_, text)  # the host patches the model when the CLIP in use changes: not part of an encode
            for _ in range(5):
                start = time.process_time()
                clip_.encode_from_tokens(clip_.tokenize(text))
                least[name] = min(least.get(name, math.inf), time.process_time() - start)
    more = least["with"] - least["without"]
    assert more < 0.02, least
    return ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in least.items()) + f": {more * 1e3:+.2f} ms"


def main() -> None:
    logging.disable(logging.WARNING)
    if WRITING:
        for name, text in texts(pack_schemas()).items():
            (ROOT / "locales" / "en").mkdir(parents=True, exist_ok=True)
            (ROOT / "locales" / "en" / name).write_text(text, "utf-8")
        return
    results = {}
    for name, check in [(n, f) for n, f in globals().items() if n.startswith("check_")]:
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                detail, problem = check() or "", ""
        except Exception:
            detail, problem = "", traceback.format_exc(limit=-4)
        results[name] = {"problem": problem, "detail": detail, "seconds": round(time.perf_counter() - start, 2)}
    import comfyui_version

    results["host"] = {"problem": "", "detail": f"ComfyUI {comfyui_version.__version__}"}
    sys.stdout.write("\n" + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
