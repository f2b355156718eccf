"""Which prefix belongs into which text encoder of this process, and what happens where there is none."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...apl_core.errors import PolicyError
from ...apl_core.policy import Policy
from ...apl_core.prefix import AnonymizationPrompt
from ..clip_patch import Layout

TAG = "apl_encoder"
_AGREED_ROWS = 4096


@dataclass(frozen=True)
class Encoder:
    """What is known of one tokenizer or text encoder. `problem` says why it has no prefix; "" where it has one."""

    family: str
    key: str
    width: int
    problem: str = ""


def width_of(encoder: Any) -> int:
    """Columns of a text encoder's token embeddings; 0 where it is built in another way."""
    try:
        return int(encoder.transformer.get_input_embeddings().weight.shape[-1])
    except (AttributeError, TypeError, NotImplementedError):
        return 0


class Guard:
    """The policy, its vectors, and the counters.

    Args:
        policy: an enforced policy.
        prefixes: family to prefix, as the policy pins them.

    Raises:
        PolicyError: a prefix does not stand at the beginning of its chunk, where alone it can be verified.
    """

    def __init__(self, policy: Policy, prefixes: Mapping[str, AnonymizationPrompt]) -> None:
        self.policy, self.prefixes = policy, dict(prefixes)
        self.counters: Counter[str] = Counter()
        self.check: Callable[[], None] = lambda: None  # ends the process where a hook is gone; set once they are placed
        self._rows: dict[tuple[str, str], tuple[torch.Tensor, ...]] = {}
        self._matrices: dict[tuple[str, str, str], torch.Tensor] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._agreed: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self.projections: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
        self._excused: weakref.WeakKeyDictionary[Any, tuple[Any, frozenset[int]]] = weakref.WeakKeyDictionary()
        for family, prefix in self.prefixes.items():
            if prefix.meta.placement != "prefix":
                raise PolicyError(f"{prefix.name} stands at the chunk's {prefix.meta.placement}.",
                                  'Enforced mode verifies prefixes with the placement "prefix" only.',
                                  field=f"embeddings.{family}")
            for key, vectors in prefix.tensors.items():
                name = {"sd1": "clip_l", "sd2": "clip_h"}.get(family, "") if key == "emb_params" else key
                self._rows[family, name] = tuple(vectors.unbind(0))

    # -- counting

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter of the status route."""
        with self._lock:
            self.counters[name] += number

    def refuse(self, message: str, hint: str, field: str) -> PolicyError:
        """The error to raise; counted."""
        self.count("refused")
        return PolicyError(message, hint, field=field)

    # -- text encoders

    def adopt(self, clip: Any) -> None:
        """Write into a CLIP's new tokenizers and text encoders what they are. Copies keep what is written."""
        model, tokenizer = clip.cond_stage_model, clip.tokenizer
        family, problem = self._family(model)
        found = {name: child for name, child in model.named_children() if hasattr(child, "process_tokens")}
        tags = {}
        for name, child in found.items():
            width = width_of(child)
            rows = self._rows.get((family, name))
            why = problem
            if not why and rows is None:
                why = f"This server has no anonymization prompt for {name} of {family}."
            elif not why and rows is not None and rows[0].numel() != width:
                why = (f"This server's anonymization prompt for {family} is {rows[0].numel()} wide; this model's "
                       f"{name} is {width} wide.")
            tags[name] = Encoder(family, name, width, why)
        # One encoder without a prefix brings the likeness back: then the whole model has none.
        worst = next((tag.problem for tag in tags.values() if tag.problem), "" if tags else problem)
        for name, tag in tags.items():
            tag = Encoder(tag.family, tag.key, tag.width, worst)
            transformer = getattr(found[name], "transformer", None)
            text_model = getattr(transformer, "text_model", None)
            for part in (getattr(tokenizer, name, None), found[name], text_model):
                if part is not None:
                    setattr(part, TAG, tag)
            if text_model is not None and (projection := getattr(transformer, "text_projection", None)) is not None:
                self.projections[text_model] = weakref.ref(projection)
        setattr(model, TAG, Encoder(family, "", 0, worst))

    def _family(self, model: Any) -> tuple[str, str]:
        from comfy import sd1_clip, sdxl_clip

        names = {name for name, child in model.named_children() if hasattr(child, "process_tokens")}
        if isinstance(model, sdxl_clip.SDXLClipModel) and names == {"clip_l", "clip_g"}:
            return "sdxl", ""
        if isinstance(model, sdxl_clip.SDXLRefinerClipModel) and names == {"clip_g"}:
            return "sdxl", ""
        if isinstance(model, sd1_clip.SD1ClipModel) and names in ({"clip_l"}, {"clip_h"}):
            return ("sd1" if names == {"clip_l"} else "sd2"), ""
        shown = ", ".join(sorted(names)) or type(model).__name__
        return "", f"This model reads text with {shown}, for which there is no anonymization prompt."

    def encoder_of(self, part: Any, width: int, key: str = "") -> Encoder:
        """What a tokenizer or text encoder is; by its width where no CLIP of the host's was made with it."""
        tag = getattr(part, TAG, None)
        if isinstance(tag, Encoder):
            return tag
        fitting = [place for place, rows in self._rows.items()
                   if rows[0].numel() == width and (not key or place[1] == key)]
        if len(fitting) == 1:
            return Encoder(*fitting[0], width)
        return Encoder("", key, width, "This text encoder was not loaded by ComfyUI's own loaders, and it cannot be "
                                       "told which anonymization prompt it needs.")

    def unprotected(self, encoder: Encoder) -> bool:
        """Whether this encoder is let through without a prefix.

        Raises:
            PolicyError: it has none, and the policy does not allow that.
        """
        if not encoder.problem:
            return False
        if self.policy.unsupported == "allow":
            return True
        raise self.refuse(encoder.problem, "Use a model of: " + ", ".join(sorted(self.prefixes)) + ".", "clip")

    def layout(self, encoder: Encoder, start: int, end: int, pad: int, length: int) -> Layout:
        """How an encoder's chunks are laid out."""
        return Layout(self._rows[encoder.family, encoder.key], start, end, pad, length, "prefix", "chunk")

    def matrices(self, model: Any, width: int, device: torch.device) -> list[torch.Tensor]:
        """The float32 [m, width] prefixes that may stand in a text encoder's rows: its own, or all that fit."""
        tag = getattr(model, TAG, None)
        places = [(tag.family, tag.key)] if isinstance(tag, Encoder) and not tag.problem else [
            place for place, rows in self._rows.items() if rows[0].numel() == width]
        found = []
        for place in places:
            kept = (*place, str(device))
            if kept not in self._matrices:
                self._matrices[kept] = torch.stack(self._rows[place]).to(device)
            found.append(self._matrices[kept])
        return [matrix for matrix in found if matrix.shape[1] == width]

    # -- exceptions to the rule

    @property
    def is_plain(self) -> bool:
        """Whether this thread encodes a negative prompt's plain twin at the moment."""
        return getattr(self._local, "plain", False)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Let this thread encode without the prefix. For `negative` alone."""
        before, self._local.plain = self.is_plain, True
        try:
            yield
        finally:
            self._local.plain = before

    def agree(self, row: Sequence[int]) -> None:
        """Remember the token ids of a prompt that consent covers as a whole."""
        with self._lock:
            self._agreed[tuple(row)] = None
            self._agreed.move_to_end(tuple(row))
            while len(self._agreed) > _AGREED_ROWS:
                self._agreed.popitem(last=False)

    def is_agreed(self, row: Sequence[Any]) -> bool:
        """Whether a row holds nothing but such a prompt. The ids are the prompt: who repeats them says the same."""
        if not self._agreed or not all(type(entry) is int for entry in row):
            return False
        return tuple(row) in self._agreed

    def excuse(self, model: Any, embeds: torch.Tensor, rows: frozenset[int]) -> None:
        """Tell `verify` which rows of the tensor it gets next stand without the prefix by agreement."""
        self._excused[model] = (weakref.ref(embeds), rows)

    def excused(self, model: Any, embeds: torch.Tensor) -> frozenset[int]:
        """Those rows, if this is the very tensor."""
        kept = self._excused.get(model)
        return kept[1] if kept is not None and kept[0]() is embeds else frozenset()
