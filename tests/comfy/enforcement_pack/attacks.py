"""What a pack, or a user through a pack, could try. Every node takes a text with the person's name and a CLIP."""

from __future__ import annotations

import os
import pickle

import comfy.sampler_helpers
import comfy.sd1_clip
import folder_paths
import torch
from comfy_execution.graph_utils import GraphBuilder

from .model import OPTIONS, WIDTH_L, clip_of
from .spy import prefixes

START, END = 49406, 49407
NODES: dict[str, type] = {}


def _ids(clip, text: str) -> list[int]:
    return clip.tokenizer.clip_l.tokenizer(text)["input_ids"][1:-1]


def _row(words: list, length: int = 77) -> list:
    return [START, *words, END] + [END] * (length - len(words) - 2)


def _prefix(width: int) -> torch.Tensor:
    return next(rows for rows in prefixes() if rows.shape[1] == width)


def node(outputs=("CONDITIONING",), output_node: bool = False, **inputs):
    """Make a node of the host's older manner from a function."""

    def make(function):
        required = {name: (kind, {}) if isinstance(kind, str) else kind for name, kind in inputs.items()}
        NODES[function.__name__] = type(function.__name__, (), {
            "INPUT_TYPES": classmethod(lambda cls: {"required": required}), "RETURN_TYPES": tuple(outputs),
            "FUNCTION": "run", "CATEGORY": "test", "OUTPUT_NODE": output_node,
            "run": lambda self, **kwargs: function(**kwargs), "IS_CHANGED": classmethod(lambda cls, **_: float("nan")),
        })
        return function

    return make


CLIP_TEXT = {"clip": "CLIP", "text": ("STRING", {"default": ""})}


@node(outputs=(), output_node=True, conditioning="CONDITIONING")
def TestSink(conditioning):
    """What a sampler does with conditioning first."""
    comfy.sampler_helpers.convert_cond(conditioning)
    return {"ui": {"count": [len(conditioning)]}}


@node(outputs=(), output_node=True, latent="LATENT")
def TestLatent(latent):
    samples = latent["samples"]
    return {"ui": {"values": [samples.float().flatten().tolist()], "mean": [float(samples.float().mean())]}}


@node(outputs=("CLIP",), encoder=(["sdxl", "refiner", "sd3", "t5"],))
def TestClip(encoder):
    return (clip_of(encoder),)


@node(**CLIP_TEXT)
def TestRawIds(clip, text):
    clip.load_model()
    model = clip.cond_stage_model.clip_l.transformer.text_model
    out = model(torch.tensor([_row(_ids(clip, text))]))
    return ([[out[0], {"pooled_output": out[2]}]],)


def _embeds(clip, row: list) -> torch.Tensor:
    table = clip.cond_stage_model.clip_l.transformer.get_input_embeddings()
    return torch.stack([entry.float() if torch.is_tensor(entry)
                        else table(torch.tensor([entry]), out_dtype=torch.float32)[0] for entry in row])[None]


@node(how=(["bare", "behind", "reversed", "nearly", "masked", "short"],), **CLIP_TEXT)
def TestRawEmbeds(how, clip, text):
    """Vectors made by hand: without the prefix, with it elsewhere, reversed, nearly right, or hidden by the mask."""
    clip.load_model()
    words, ap = _ids(clip, text), _prefix(WIDTH_L)
    row = {"bare": _row(words), "behind": _row([*words, *ap]), "reversed": _row([*ap.flip(0), *words]),
           "nearly": _row([*(ap * 1.0001), *words]), "masked": _row([*ap, *words]), "short": _row(words)[:8]}[how]
    mask = None
    if how == "masked":
        mask = torch.ones(1, 77)
        mask[:, 1 : 1 + len(ap)] = 0
    out = clip.cond_stage_model.clip_l.transformer(None, mask, embeds=_embeds(clip, row), num_tokens=[len(words) + 2])
    return ([[out[0], {"pooled_output": out[2]}]],)


@node(**CLIP_TEXT)
def TestLayersDirectly(clip, text):
    """Round the verified door, into the layers: text is encoded, but what comes out is not sealed."""
    clip.load_model()
    model = clip.cond_stage_model.clip_l.transformer.text_model
    x = _embeds(clip, _row(_ids(clip, text)))
    x = x + comfy.ops.cast_to(model.embeddings.position_embedding.weight, dtype=torch.float32, device=x.device)
    return ([[model.final_layer_norm(model.encoder(x)[0]), {"pooled_output": x[:, 0]}]],)


@node(how=(["short", "full", "no start", "name first", "prefix last", "double end", "ints of tensors"],), **CLIP_TEXT)
def TestTokens(how, clip, text):
    """Tokens made by hand, through the CLIP's ordinary encode."""
    words, ap = _ids(clip, text), list(_prefix(WIDTH_L))
    row = {"short": _row(words), "full": _row((words * 75)[:75]), "no start": [END, *_row(words)[1:]],
           "name first": [words[0], *ap, *words[1:], END] + [END] * (77 - len(words) - len(ap) - 1),
           "prefix last": _row([*words, *ap]), "double end": [START, END, *words, END] + [END] * (77 - len(words) - 3),
           "ints of tensors": _row(list(_embeds(clip, words)[0]))}[how]
    return (clip.encode_from_tokens_scheduled({"l": [[(token, 1.0) for token in row]]}),)


@node(seed=("INT", {"default": 0}))
def TestForeign(seed):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, WIDTH_L, generator=generator)
    return ([[torch.randn(1, 77, WIDTH_L, generator=generator), {"pooled_output": pooled}]],)


@node(conditioning="CONDITIONING")
def TestThroughFile(conditioning):
    """Write conditioning to a file and read it again, the mark with it."""
    path = os.path.join(folder_paths.get_output_directory(), "conditioning.bin")  # noqa: PTH118
    with open(path, "wb") as handle:  # noqa: PTH123
        pickle.dump([[cond.clone(), extra] for cond, extra in conditioning], handle)
    with open(path, "rb") as handle:  # noqa: PTH123
        return (pickle.load(handle),)


@node(conditioning="CONDITIONING")
def TestForgedMark(conditioning):
    """Another tensor under a mark made of text."""
    mark = str(conditioning[0][1].get("apl_sealed"))
    return ([[torch.ones_like(cond), {"pooled_output": extra["pooled_output"], "apl_sealed": mark, "apl": True}]
             for cond, extra in conditioning],)


@node(**CLIP_TEXT)
def TestOldStyle(clip, text):
    """How packs encoded before schedules: their own list around the encoder's tensors."""
    cond, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return ([[cond, {"pooled_output": pooled}]],)


@node(how=(["sums", "foreign", "bare", "pooled", "object", "noisy", "file"],), **CLIP_TEXT)
def TestOwnSums(how, clip, text):
    """How packs with weights of their own encode: several times, and a weighted sum of the results.

    All but the first put something else into the sum or beside it.
    """
    rows = [clip.encode_from_tokens(clip.tokenize(each), return_pooled=True) for each in (text, f"{text} b", "")]
    weights = torch.linspace(-0.5, 2, 77).reshape(1, -1, 1)
    cond = rows[0][0] * weights + 0.7 * rows[1][0][:, :77] - 0.2 * rows[2][0]
    pooled, extra = 1.2 * rows[0][1] - 0.2 * rows[2][1], {}
    generator = torch.Generator().manual_seed(11)
    if how == "foreign":
        cond = cond + 0.2 * torch.randn(cond.shape, generator=generator)
    elif how == "bare":
        cond = cond + 0.5 * TestLayersDirectly(clip, text)[0][0][0]
    elif how == "pooled":
        pooled = torch.randn(pooled.shape, generator=generator)
    elif how == "object":
        extra = {"hooks_of_mine": [torch.zeros(1)]}
    elif how == "noisy":
        cond = torch.cat([cond, torch.randn(cond.shape, generator=generator)], 1)
    elif how == "file":  # another node's results, which this one knows only from their bytes
        path = os.path.join(folder_paths.get_output_directory(), "sums.bin")  # noqa: PTH118
        if not os.path.exists(path):  # noqa: PTH110
            torch.save(torch.randn(cond.shape, generator=generator), path)
        cond = torch.load(path)
    return ([[cond, {"pooled_output": pooled, **extra}]],)


@node(**CLIP_TEXT)
def TestInstanceTokenizer(clip, text):
    """A pack's own tokenizer, set on the instance and taken away again."""
    tokenizer = clip.tokenizer.clip_l
    tokenizer.tokenize_with_weights = lambda text, return_word_ids=False, **kwargs: [
        [(token, 1.0) for token in _row(tokenizer.tokenizer(text)["input_ids"][1:-1])]]
    try:
        return (clip.encode_from_tokens_scheduled(clip.tokenize(text)),)
    finally:
        del tokenizer.tokenize_with_weights


@node(**CLIP_TEXT)
def TestObjectPatch(clip, text):
    """An object patch that hands over vectors of its own."""
    patched = clip.clone()
    words = _ids(clip, text)

    def process_tokens(tokens, device):
        embeds = _embeds(clip, _row(words)).repeat(len(tokens), 1, 1)
        return embeds, torch.ones(len(tokens), 77), [len(words) + 2] * len(tokens), []

    patched.patcher.add_object_patch("clip_l.process_tokens", process_tokens)
    return (patched.encode_from_tokens_scheduled(patched.tokenize(text)),)


@node(text=("STRING", {"default": ""}))
def TestOwnEncoder(text):
    """A text encoder that no loader of the host made."""
    model = comfy.sd1_clip.SDClipModel(dtype=torch.float32, model_options=OPTIONS | {"model_name": "clip_l"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    tokenizer = comfy.sd1_clip.SDTokenizer()
    tokenizer.embedding_size = WIDTH_L
    cond, pooled = model.encode_token_weights(tokenizer.tokenize_with_weights(text))
    return ([[cond, {"pooled_output": pooled}]],)


@node(conditioning="CONDITIONING", key=(["area", "mask", "strength", "start_percent", "default", "unknown"],))
def TestSetKey(conditioning, key):
    value = {"area": (4, 4, 0, 0), "mask": torch.zeros(1, 16, 16), "strength": 0.0, "start_percent": 0.5,
             "default": True, "unknown": 1}[key]
    return ([[cond, extra | {key: value}] for cond, extra in conditioning],)


@node(outputs=("LATENT",), latent="LATENT", value=("FLOAT", {"default": 1.0, "min": -9.0, "max": 9.0}))
def TestNoiseMask(latent, value):
    return (latent | {"noise_mask": torch.full((1, 64, 64), value)},)


@node(conditioning="CONDITIONING")
def TestEmpty(conditioning):
    return (conditioning[:0],)


@node(**CLIP_TEXT)
def TestExpands(clip, text):
    graph = GraphBuilder()
    return {"result": (graph.node("CLIPTextEncode", clip=clip, text=text).out(0),), "expand": graph.finalize()}


@node(outputs=("LATENT",), latent="LATENT")
def TestExpandsToDenied(latent):
    graph = GraphBuilder()
    return {"result": (graph.node("LatentSubtract", samples1=latent, samples2=latent).out(0),),
            "expand": graph.finalize()}


@node(outputs=(), output_node=True, hook=(["process_tokens", "forward", "convert_cond", "validate_prompt"],))
def TestOverwrites(hook):
    """Undo a hook while the server runs."""
    import comfy.clip_model
    import execution

    owner = {"process_tokens": comfy.sd1_clip.SDClipModel, "forward": comfy.clip_model.CLIPTextModel_,
             "convert_cond": comfy.sampler_helpers, "validate_prompt": execution}[hook]
    original = getattr(owner, hook).__wrapped__
    setattr(owner, hook, original)
    return {"ui": {"done": [hook]}}
