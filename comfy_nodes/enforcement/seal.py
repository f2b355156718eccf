"""Conditioning that this server encoded, told from conditioning that came from a file, a request or elsewhere.

The mark is an object in the conditioning's dictionary. The host's nodes copy that dictionary, so averages, masks and
areas keep it; a file cannot bring one in, since writing the mark down leaves plain text behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...apl_core.errors import PolicyError
from ..clip_patch import layouts_of
from .derived import Workings
from .guard import TAG, Encoder, Guard

KEY = "apl_sealed"


@dataclass(eq=False)
class Twin:
    """How to encode a conditioning again without the prefix.

    Attributes:
        encode: the host's own `encode_from_tokens_scheduled`.
        clip, tokens, unprojected: what it was encoded from.
        at: which of the results it was; several where hooks are scheduled.
        cond, pooled: weak references to the tensors as they left the encoder.
        plain: (cond, pooled) once they were needed.
    """

    encode: Callable[..., Any]
    clip: Any
    tokens: Mapping[str, Any]
    unprojected: bool
    at: int
    cond: weakref.ref[torch.Tensor]
    pooled: Callable[[], torch.Tensor | None]
    plain: tuple[torch.Tensor, torch.Tensor | None] | None = None


class Seal(str):
    """The mark: text for whoever looks at a conditioning, and an object that cannot be made from text."""

    __slots__ = ("twin",)
    twin: Twin | None

    def __new__(cls, twin: Twin | None = None) -> Seal:
        made = super().__new__(cls, "encoded by this server")
        made.twin = twin
        return made

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (str(self),)

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[str]]:
        return self.__reduce__()

    def __copy__(self) -> Seal:
        return self

    def __deepcopy__(self, memo: Any) -> Seal:
        return self


class Sealer:
    """Seals what the host encodes and checks the seals of what it samples with."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.workings = guard, Workings(guard)
        self._encoded = WeakTensorKeyDictionary()

    def knows(self, cond: Any) -> bool:
        """Whether a tensor is, itself, what a text encoder of this server gave out."""
        return torch.is_tensor(cond) and cond in self._encoded

    def hooked_encode(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """For `CLIP.encode_from_tokens`: refuse what has no prefix, remember what came out."""

        def encode_from_tokens(clip: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            self._require(clip)
            result = original(clip, tokens, *args, **kwargs)
            cond = result[0] if isinstance(result, tuple) else result
            cond = cond.get("cond") if isinstance(cond, dict) else cond
            if torch.is_tensor(cond) and not self.guard.is_plain:
                self._encoded[cond] = True
            return result

        return encode_from_tokens

    def hooked_scheduled(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """For `CLIP.encode_from_tokens_scheduled`: mark every conditioning, keep what a plain twin would need."""

        def encode_from_tokens_scheduled(clip: Any, tokens: Any, unprojected: bool = False, *args: Any,
                                         **kwargs: Any) -> Any:
            self._require(clip)
            result = original(clip, tokens, unprojected, *args, **kwargs)
            # Who wires a negative prompt to an Anonymize node wants it there.
            twins = self.guard.policy.negative == "auto" and not self.guard.is_plain and not layouts_of(clip)
            for at, (cond, extra) in enumerate(result):
                twin = None
                if twins and torch.is_tensor(cond):
                    pooled = extra.get("pooled_output")
                    twin = Twin(original, clip, tokens, unprojected, at, weakref.ref(cond),
                                weakref.ref(pooled) if torch.is_tensor(pooled) else _nothing)
                if not self.guard.is_plain:
                    extra[KEY] = Seal(twin)
            return result

        return encode_from_tokens_scheduled

    def _require(self, clip: Any) -> None:
        tag = getattr(clip.cond_stage_model, TAG, None)
        if isinstance(tag, Encoder):
            self.guard.unprotected(tag)

    def hooked_merge(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """For `execution.merge_result_data`, through which every node's results pass: foreign conditioning stops here.

        Later would be too late: ConditioningAverage puts another tensor under a sealed one's dictionary.
        """

        def merge_result_data(results: Any, obj: Any) -> Any:
            output = original(results, obj)
            try:
                if self.guard.policy.strict:
                    for slot in output:
                        for value in slot:
                            self._check(value, type(obj).__name__ if not isinstance(obj, type) else obj.__name__)
            finally:
                self.workings.forget()
            return output

        return merge_result_data

    def hooked_convert(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """For `sampler_helpers.convert_cond`, the last place before sampling."""

        def convert_cond(cond: Any) -> Any:
            if self.guard.policy.strict:
                self._check(cond, "A node")
            return original(cond)

        return convert_cond

    def _check(self, value: Any, node: str) -> None:
        """Raises `PolicyError` when a value is conditioning and an entry of it has no seal."""
        if not is_conditioning(value):
            return
        for cond, extra in value:
            if type(extra.get(KEY)) is Seal:
                continue
            # Packs put together their own list from a tensor that was encoded here, or from sums of several.
            if self.knows(cond) or self.workings.explain(cond, extra):
                extra[KEY] = Seal()
                continue
            self.guard.count("unsealed_refused")
            raise self._unsealed(node)

    def _unsealed(self, node: str) -> PolicyError:
        return self.guard.refuse(
            f"{node} gave a conditioning that this server did not encode.",
            "Use CLIP Text Encode; conditioning from files or from other encoders is not served here.", "conditioning")


def _nothing() -> None:
    return None


def is_conditioning(value: Any) -> bool:
    """Whether a value is a list of [tensor, dictionary], which is what ComfyUI calls conditioning."""
    return (isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0
            and all(isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict)
                    and (entry[0] is None or torch.is_tensor(entry[0])) for entry in value))
