"""A WebUI small enough to read: the interfaces that the extension hooks, and text encoders that return their input.

Written from the interface, for tests without a host. What an encoder gets to see is therefore what a test can look at:
conditioning is the embedded rows themselves. Both shapes are here, AUTOMATIC1111's and Forge's.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import types
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "apl_anonymization_prompt"
BOS, EOS, COMMA = 49406, 49407, 267
PromptChunkFix = namedtuple("PromptChunkFix", ["offset", "embedding"])


def word_id(word: str) -> int:
    """A token id for a word; the same for the same word."""
    return COMMA if word == "," else 1000 + sum(ord(c) * (i + 1) for i, c in enumerate(word)) % 40000


class Inversion:
    """A textual inversion of the host."""

    def __init__(self, name: str, vec: Any, shorthash: str = "abcd") -> None:
        self.name, self.vec, self.shorthash = name, vec, shorthash
        self.vectors = len(vec if torch.is_tensor(vec) else next(iter(vec.values())))


class EmbeddingDatabase:
    """Finds inversions by the id of their word."""

    def __init__(self) -> None:
        self.fixes = None
        self.known: dict[int, Inversion] = {}

    def find_embedding_at_position(self, tokens: list[int], position: int) -> tuple[Any, Any]:
        found = self.known.get(tokens[position])
        return (found, 1) if found else (None, None)


class Chunk:
    def __init__(self) -> None:
        self.tokens, self.multipliers, self.fixes = [], [], []


class Hijack:
    """A1111's holder of fixes."""

    def __init__(self) -> None:
        self.fixes = None
        self.embedding_db = EmbeddingDatabase()


class Layer(torch.nn.Module):
    """An embedding layer that puts fixes in; A1111's EmbeddingsWithFixes and Forge's counterpart alike."""

    def __init__(self, width: int, embeddings: Any, textual_inversion_key: str) -> None:
        super().__init__()
        self.wrapped = torch.nn.Embedding(49408, width).requires_grad_(False)
        with torch.no_grad():
            self.wrapped.weight.copy_(torch.arange(49408).float()[:, None].expand(-1, width))
        self.embeddings, self.textual_inversion_key = embeddings, textual_inversion_key

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        batch, self.embeddings.fixes = self.embeddings.fixes, None
        out = self.wrapped(input_ids).clone()
        for line, fixes in zip(out, batch or [], strict=False):
            for offset, embedding in fixes:
                vec = embedding.vec
                vec = vec[self.textual_inversion_key] if isinstance(vec, dict) else vec
                line[offset + 1 : offset + 1 + len(vec)] = vec
        return out


class Cutter:
    """The chunking that both shapes share."""

    id_start, id_end, id_pad, comma_token = BOS, EOS, EOS, COMMA

    def _database(self) -> EmbeddingDatabase:
        raise NotImplementedError

    def empty_chunk(self) -> Chunk:
        chunk = Chunk()
        chunk.tokens = [BOS] + [EOS] * (self.chunk_length + 1)
        chunk.multipliers = [1.0] * (self.chunk_length + 2)
        return chunk

    def get_target_prompt_token_count(self, count: int) -> int:
        return math.ceil(max(count, 1) / self.chunk_length) * self.chunk_length

    def tokenize_line(self, line: str) -> tuple[list[Chunk], int]:
        chunks, chunk, count = [], Chunk(), 0

        def close(last: bool = False) -> None:
            nonlocal chunk, count
            count += len(chunk.tokens) if last else self.chunk_length
            room = self.chunk_length - len(chunk.tokens)
            chunk.tokens = [BOS, *chunk.tokens, *[EOS] * (room + 1)]
            chunk.multipliers = [1.0, *chunk.multipliers, *[1.0] * (room + 1)]
            chunks.append(chunk)
            chunk = Chunk()

        for part, weight in ((p, 1.4 if p.startswith("(") else 1.0) for p in line.replace(",", " ,").split()):
            if part == "BREAK":
                close()
                continue
            ids = [word_id(part.strip("()"))]
            if len(chunk.tokens) == self.chunk_length:
                close()
            inversion, _ = self._database().find_embedding_at_position(ids, 0)
            if inversion is None:
                chunk.tokens.append(ids[0])
                chunk.multipliers.append(weight)
                continue
            if len(chunk.tokens) + inversion.vectors > self.chunk_length:
                close()
            chunk.fixes.append(PromptChunkFix(len(chunk.tokens), inversion))
            chunk.tokens += [0] * inversion.vectors
            chunk.multipliers += [weight] * inversion.vectors
        if chunk.tokens or not chunks:
            close(last=True)
        return chunks, count

    def process_texts(self, texts: list[str]) -> tuple[list[list[Chunk]], int]:
        done = {text: self.tokenize_line(text) for text in texts}
        return [done[text][0] for text in texts], max(count for _, count in done.values())

    def _run(self, texts: list[str], holder: Any) -> torch.Tensor:
        batch, _ = self.process_texts(texts)
        out = []
        for at in range(max(map(len, batch))):
            lines = [chunks[at] if at < len(chunks) else self.empty_chunk() for chunks in batch]
            holder.fixes = [line.fixes for line in lines]
            out.append(self.process_tokens([line.tokens for line in lines], [line.multipliers for line in lines]))
        return torch.hstack(out)

    def process_tokens(self, tokens: list[list[int]], multipliers: list[list[float]]) -> torch.Tensor:
        assert all(len(line) == 77 for line in tokens)
        self.seen_multipliers = multipliers
        return self.layer(torch.tensor(tokens))


class TextConditionalModel(Cutter, torch.nn.Module):
    def __init__(self, width: int = 96, key: str = "clip_l", hijack: Hijack | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.hijack = hijack or Hijack()
        self.chunk_length = 75
        self.layer = Layer.KINDS["a1111"](width, self.hijack, key)

    def _database(self) -> EmbeddingDatabase:
        return self.hijack.embedding_db

    def forward(self, texts: list[str]) -> torch.Tensor:
        return self._run(texts, self.hijack)


class FrozenCLIPEmbedderWithCustomWordsBase(TextConditionalModel):
    def forward(self, texts: list[str]) -> torch.Tensor:
        from modules import shared

        if shared.opts.use_old_emphasis_implementation:  # no chunks, no tokenize_line
            self.hijack.fixes = [[] for _ in texts]
            ids = [[word_id(word) for word in text.split()][:75] for text in texts]
            lines = [[BOS, *each, *[EOS] * (76 - len(each))] for each in ids]
            return self.process_tokens(lines, [[1.0] * 77] * len(ids))
        return super().forward(texts)


class ClassicTextProcessingEngine(Cutter):
    def __init__(self, width: int = 96, key: str = "clip_l") -> None:
        self.embeddings = EmbeddingDatabase()
        self.chunk_length = 75
        self.layer = Layer.KINDS["forge"](width, self.embeddings, key)
        self.text_encoder = torch.nn.Sequential(self.layer)

    def _database(self) -> EmbeddingDatabase:
        return self.embeddings

    def __call__(self, texts: list[str]) -> torch.Tensor:
        out = self._run(texts, self.embeddings)
        listed = sys.modules["backend.text_processing.classic_engine"].last_extra_generation_params
        batch, _ = self.process_texts(texts)
        names = {fix.embedding.name for chunks in batch for chunk in chunks for fix in chunk.fixes}
        if names:
            listed["TI"] = ", ".join(sorted(names))
        return out


class EmbeddingsWithFixes(Layer):
    pass


class CLIPEmbeddingForTextualInversion(Layer):
    pass


Layer.KINDS = {"a1111": EmbeddingsWithFixes, "forge": CLIPEmbeddingForTextualInversion}


class SdConditioning(list):
    def __init__(self, prompts: Any, is_negative_prompt: bool = False, copy_from: Any = None) -> None:
        super().__init__(prompts)
        source = prompts if copy_from is None else copy_from
        self.is_negative_prompt = is_negative_prompt or getattr(source, "is_negative_prompt", False)


def get_learned_conditioning(model: Any, prompts: Any, steps: int, *rest: Any) -> list[Any]:
    return [model.get_learned_conditioning(SdConditioning([prompt], copy_from=prompts)) for prompt in prompts]


def get_multicond_prompt_list(prompts: list[str]) -> tuple[list[list[tuple[int, float]]], Any, dict]:
    flat, indexes = SdConditioning(prompts), []
    flat.clear()
    for prompt in prompts:
        parts = []
        for part in re.split(r"\bAND\b", prompt):
            match = re.fullmatch(r"(.*?)(?:\s*:\s*([-+]?[\d.]+))?\s*", part, re.S)
            flat.append(match[1])
            parts.append((len(flat) - 1, float(match[2]) if match[2] else 1.0))
        indexes.append(parts)
    return indexes, flat, {}


def get_multicond_learned_conditioning(model: Any, prompts: Any, steps: int, *rest: Any) -> list[Any]:
    _, flat, _ = get_multicond_prompt_list(prompts)
    return sys.modules["modules.prompt_parser"].get_learned_conditioning(model, flat, steps, *rest)


class Processing:
    """StableDiffusionProcessing, as far as conditioning goes."""

    cached_c: ClassVar[list[Any]] = [None, None]
    cached_uc: ClassVar[list[Any]] = [None, None]

    def __init__(self, prompt: str = "a man", negative_prompt: str = "", cfg_scale: float = 7.0, **fields: Any) -> None:
        self.prompt, self.negative_prompt, self.cfg_scale = prompt, negative_prompt, cfg_scale
        self.prompts, self.negative_prompts = [prompt], [negative_prompt]
        self.extra_generation_params, self.scripts, self.script_args = {}, None, None
        self.comments, self.c, self.uc = [], None, None
        self.inside = None
        self.cached_c, self.cached_uc = type(self).cached_c, type(self).cached_uc
        self.__dict__.update(fields)

    def comment(self, text: str) -> None:
        self.comments.append(text)

    def calculate_hr_conds(self) -> None:
        parser = sys.modules["modules.prompt_parser"]
        self.hr_uc = self.get_conds_with_caching(parser.get_learned_conditioning,
                                                 SdConditioning(self.negative_prompts, True), 1, [[None, None]])

    def cached_params(self, required_prompts: Any, steps: int, *rest: Any) -> tuple[Any, ...]:
        return (list(required_prompts), steps)

    def get_conds_with_caching(self, function: Any, required_prompts: Any, steps: int, caches: Any, *rest: Any) -> Any:
        key = self.cached_params(required_prompts, steps)
        for cache in caches:
            if cache[0] is not None and cache[0] == key:
                return cache[1]
        caches[0][:] = [key, function(sys.modules["modules.sd_models"].model_data.sd_model, required_prompts, steps)]
        return caches[0][1]


def process_images_inner(p: Processing) -> Any:
    parser = sys.modules["modules.prompt_parser"]
    if p.scripts is not None:
        for script in p.scripts.alwayson_scripts:
            script.process(p, *p.script_args[script.args_from : script.args_to])
    if sys.modules["modules.shared"].state.interrupted:
        return types.SimpleNamespace(images=[], index_of_first_image=0)
    p.uc = p.get_conds_with_caching(parser.get_learned_conditioning, SdConditioning(p.negative_prompts, True), 1,
                                    [p.cached_uc])
    p.c = p.get_conds_with_caching(parser.get_multicond_learned_conditioning, SdConditioning(p.prompts), 1,
                                   [p.cached_c])
    if getattr(p, "enable_hr", False):
        p.calculate_hr_conds()
    if p.inside is not None:
        p.inside()
    return types.SimpleNamespace(images=[], index_of_first_image=0)


class Script:
    args_from = args_to = None

    def title(self) -> str:
        return type(self).__name__


class ScriptRunner:
    def __init__(self) -> None:
        self.scripts, self.alwayson_scripts, self.selectable_scripts = [], [], []

    def initialize_scripts(self, is_img2img: bool) -> None:
        self.scripts[:] = self.available
        self.alwayson_scripts[:] = self.available

    def run(self, p: Processing, *args: Any) -> Any:
        return self.selected(p)


class Options:
    def __init__(self) -> None:
        self.__dict__["data"] = {"use_old_emphasis_implementation": False, "disabled_extensions": [],
                                 "disable_all_extensions": "none", "CLIP_stop_at_last_layers": 1}

    def __setattr__(self, key: str, value: Any) -> None:
        self.data[key] = value

    def __getattr__(self, key: str) -> Any:
        if key in self.__dict__["data"]:
            return self.__dict__["data"][key]
        raise AttributeError(key)

    def set(self, key: str, value: Any, is_api: bool = False) -> bool:
        try:
            setattr(self, key, value)
        except RuntimeError:
            return False
        return True


class Model:
    """A loaded checkpoint of either shape and family."""

    def __init__(self, *encoders: Any, family: str = "sd1", forge: bool = False) -> None:
        for flag in ("is_sd1", "is_sd2", "is_sdxl", "is_sd3"):
            setattr(self, flag, flag == f"is_{family}")
        self._encoders = encoders
        if forge:
            self.text_processing_engine_l = encoders[0]
            if len(encoders) > 1:
                self.text_processing_engine_g = encoders[1]
        elif family == "sdxl":
            self.conditioner = types.SimpleNamespace(embedders=list(encoders))
        else:
            self.cond_stage_model = encoders[0]

    def get_learned_conditioning(self, texts: Any) -> Any:
        out = [encoder(texts) for encoder in self._encoders]
        return out[0] if len(out) == 1 else out


def _module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    for value in members.values():
        if isinstance(value, type) and value.__module__ == __name__ and value is not Layer:
            value.__module__ = name  # the extension looks for the fixes' class where an encoder's class is defined
    return made


def copy_class(kind: type, *bases: type) -> type:
    """A class of the same name and members: hooks on it end with the test."""
    skip = ("__dict__", "__weakref__")
    return type(kind.__name__, bases or kind.__bases__, {k: v for k, v in vars(kind).items() if k not in skip})


class Callbacks(types.ModuleType):
    """modules.script_callbacks: remembers what was registered."""

    def __init__(self) -> None:
        super().__init__("modules.script_callbacks")
        self.registered: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda function, **_: self.registered.setdefault(name, []).append(function)

    def fire(self, name: str, *args: Any) -> list[Any]:
        return [function(*args) for function in self.registered.get(name, [])]


class Host:
    """A fake host with the extension loaded as the real one does it."""

    def __init__(self, modules: dict[str, types.ModuleType], shape: str, folder: Path) -> None:
        self.modules, self.shape, self.folder = modules, shape, folder
        self.parser, self.processing = modules["modules.prompt_parser"], modules["modules.processing"]
        self.shared, self.callbacks = modules["modules.shared"], modules["modules.script_callbacks"]
        self.runner, self.shim = ScriptRunner(), None

    def load(self) -> None:
        """Run scripts/apl.py, at the start or at "Reload UI"."""
        spec = importlib.util.spec_from_file_location("apl.py", ROOT / "scripts" / "apl.py")
        self.shim = importlib.util.module_from_spec(spec)
        self.callbacks.registered.clear()
        spec.loader.exec_module(self.shim)
        script = self.shim.Script()
        script.args_from, script.args_to = 1, 4
        self.runner.alwayson_scripts = [script]

    def ours(self, name: str) -> Any:
        """A module of the extension."""
        return importlib.import_module(f"{PACKAGE}.a1111_extension.{name}")

    def encoder(self, width: int = 96, key: str = "clip_l", **more: Any) -> Any:
        if self.shape == "forge":
            return self.modules["backend.text_processing.classic_engine"].ClassicTextProcessingEngine(width, key)
        return self.modules["modules.sd_hijack_clip"].FrozenCLIPEmbedderWithCustomWordsBase(width, key, **more)

    def use(self, *encoders: Any, family: str = "sd1") -> Model:
        """Load a checkpoint."""
        model = Model(*encoders, family=family, forge=self.shape == "forge")
        self.modules["modules.sd_models"].model_data.sd_model = model
        return model

    def job(self, prompt: str = "a man", *, args: Any = (), scripts: bool = True, **fields: Any) -> Processing:
        """Run a job; `args` are the script's. Returns it with its conditioning."""
        p = self.processing.StableDiffusionProcessing(prompt, **fields)
        if scripts:
            p.scripts, p.script_args = self.runner, (0, *args, *[None] * (3 - len(args)))
        self.processing.process_images_inner(p)
        return p


@contextmanager
def fake_host(shape: str, folder: Path, *, environ: dict[str, str] | None = None, cmd: dict[str, Any] | None = None,
              cached_params: bool = True) -> Iterator[Host]:
    """Install the fake modules of a shape and load the extension; all gone afterwards."""
    import os

    layers = {"a1111": copy_class(EmbeddingsWithFixes, Layer),
              "forge": copy_class(CLIPEmbeddingForTextualInversion, Layer)}
    database = copy_class(EmbeddingDatabase, object)
    base = copy_class(TextConditionalModel, Cutter, torch.nn.Module)
    base.__init__ = _initializer(base, layers["a1111"], database)
    frozen = copy_class(FrozenCLIPEmbedderWithCustomWordsBase, base)
    frozen.forward = _old_or(base)
    engine = copy_class(ClassicTextProcessingEngine, Cutter)
    engine.__init__ = _engine_initializer(layers["forge"], database)
    processing = copy_class(Processing, object)
    processing.cached_c, processing.cached_uc = [None, None], [None, None]
    if not cached_params:
        processing.get_conds_with_caching = _old_caching
        del processing.cached_params
    options, runner = copy_class(Options, object), copy_class(ScriptRunner, object)
    opts = options()
    arguments = types.SimpleNamespace(**{"apl_policy": None, "apl_dir": str(folder / "prefixes"), "api": True,
                                         "api_auth": None, **(cmd or {})})
    made = {
        "modules": types.ModuleType("modules"),
        "modules.prompt_parser": _module("modules.prompt_parser", SdConditioning=SdConditioning,
                                         get_learned_conditioning=get_learned_conditioning,
                                         get_multicond_learned_conditioning=get_multicond_learned_conditioning,
                                         get_multicond_prompt_list=get_multicond_prompt_list),
        "modules.processing": _module("modules.processing", StableDiffusionProcessing=processing,
                                      process_images_inner=process_images_inner),
        "modules.scripts": _module("modules.scripts", Script=copy_class(Script, object), ScriptRunner=runner,
                                   AlwaysVisible=object(), basedir=lambda: str(ROOT), scripts_data=[]),
        "modules.sd_models": _module("modules.sd_models", model_data=types.SimpleNamespace(sd_model=None),
                                     get_empty_cond=lambda model: model.get_learned_conditioning([""])),
        "modules.shared": _module("modules.shared", opts=opts, cmd_opts=arguments,
                                  state=types.SimpleNamespace(interrupted=False)),
        "modules.devices": _module("modules.devices", device=torch.device("cpu"), autocast=nullcontext),
        "modules.options": _module("modules.options", Options=options),
        "modules.paths_internal": _module("modules.paths_internal", script_path=str(folder), models_path=str(folder)),
        "modules.script_callbacks": Callbacks(),
        "modules.textual_inversion": types.ModuleType("modules.textual_inversion"),
        "modules.textual_inversion.textual_inversion": _module(
            "modules.textual_inversion.textual_inversion", EmbeddingDatabase=database,
            train_embedding=lambda *_: "trained", create_embedding=lambda *_: "made"),
    }
    if shape == "forge":
        made |= {
            "backend": types.ModuleType("backend"),
            "backend.text_processing": types.ModuleType("backend.text_processing"),
            "backend.text_processing.classic_engine": _module(
                "backend.text_processing.classic_engine", ClassicTextProcessingEngine=engine,
                CLIPEmbeddingForTextualInversion=layers["forge"], PromptChunkFix=PromptChunkFix,
                last_extra_generation_params={}),
            "backend.text_processing.textual_inversion": _module("backend.text_processing.textual_inversion",
                                                                 EmbeddingDatabase=database),
        }
    elif shape == "a1111":
        made |= {
            "modules.sd_hijack_clip": _module("modules.sd_hijack_clip", TextConditionalModel=base,
                                              FrozenCLIPEmbedderWithCustomWordsBase=frozen,
                                              PromptChunkFix=PromptChunkFix),
            "modules.sd_hijack": _module("modules.sd_hijack", EmbeddingsWithFixes=layers["a1111"]),
        }
    for kind in (base, frozen, engine):
        kind.__module__ = "backend.text_processing.classic_engine" if kind is engine else "modules.sd_hijack_clip"
    for name, module in made.items():
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(made[parent], leaf, module)
        module.__path__ = []
    before = {name: module for name, module in sys.modules.items() if _theirs(name)}
    kept_environ = os.environ.pop("APL_POLICY", None)
    os.environ.update(environ or {})
    for name in before:
        del sys.modules[name]
    sys.modules.update(made)
    try:
        host = Host(made, shape, folder)
        host.load()
        yield host
    finally:
        for name in [name for name in sys.modules if _theirs(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        for name in environ or {}:
            os.environ.pop(name, None)
        if kept_environ is not None:
            os.environ["APL_POLICY"] = kept_environ


def _theirs(name: str) -> bool:
    return name.split(".")[0] in ("modules", "backend", PACKAGE)


def _initializer(base: type, layer: type, database: type) -> Any:
    def __init__(self: Any, width: int = 96, key: str = "clip_l", hijack: Hijack | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.hijack = hijack or Hijack()
        if not isinstance(self.hijack.embedding_db, database):
            self.hijack.embedding_db = database()
        self.chunk_length = 75
        self.layer = layer(width, self.hijack, key)

    return __init__


def _engine_initializer(layer: type, database: type) -> Any:
    def __init__(self: Any, width: int = 96, key: str = "clip_l") -> None:
        self.embeddings = database()
        self.chunk_length = 75
        self.layer = layer(width, self.embeddings, key)
        self.text_encoder = torch.nn.Sequential(self.layer)

    return __init__


def _old_or(base: type) -> Any:
    old = FrozenCLIPEmbedderWithCustomWordsBase.forward

    def forward(self: Any, texts: list[str]) -> torch.Tensor:
        if sys.modules["modules.shared"].opts.use_old_emphasis_implementation:
            return old(self, texts)
        return base.forward(self, texts)

    return forward


def _old_caching(self: Any, function: Any, required_prompts: Any, steps: int, caches: Any, *rest: Any) -> Any:
    key = (list(required_prompts), steps)
    for cache in caches:
        if cache[0] is not None and cache[0] == key:
            return cache[1]
    caches[0][:] = [key, function(sys.modules["modules.sd_models"].model_data.sd_model, required_prompts, steps)]
    return caches[0][1]
