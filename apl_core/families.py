"""The model families an anonymization prompt can belong to, and how a file's tensors tell which one it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ModelError, PrefixFileError


@dataclass(frozen=True)
class Family:
    """One family of text encoders.

    Attributes:
        name: short name used in settings and reports, such as "sd1".
        widths: width (number of columns) of each tensor a file of this family holds, by tensor key.
        architecture: the ModelSpec 1.0.1 `modelspec.architecture` value its files carry.
        label: the name people know it by.
    """

    name: str
    widths: Mapping[str, int]
    architecture: str
    label: str


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sd1", {"emb_params": 768}, "stable-diffusion-v1/textual-inversion", "Stable Diffusion 1.x"),
        Family("sd2", {"emb_params": 1024}, "stable-diffusion-v2-512/textual-inversion", "Stable Diffusion 2.x"),
        Family(
            "sdxl",
            {"clip_l": 768, "clip_g": 1280},
            "stable-diffusion-xl-v1-base/textual-inversion",
            "Stable Diffusion XL",
        ),
        # The two below are a promise about the file only: what they hold is fixed, nothing here trains them.
        Family(
            "sd3",
            {"clip_l": 768, "clip_g": 1280, "t5xxl": 4096},
            "stable-diffusion-v3-medium/textual-inversion",
            "Stable Diffusion 3",
        ),
        Family("flux", {"clip_l": 768, "t5xxl": 4096}, "flux-1-dev/textual-inversion", "Flux.1"),
    )
}

KNOWN_KEYS = frozenset(key for family in FAMILIES.values() for key in family.widths)

# ModelSpec gives several ids to one family (v2-512, v2-768-v, xl-v1-base, xl-v1-refiner ...): their beginnings decide.
_ARCHITECTURE_STARTS = (
    ("stable-diffusion-v1", "sd1"),
    ("stable-diffusion-v2", "sd2"),
    ("stable-diffusion-xl", "sdxl"),
    ("stable-diffusion-v3", "sd3"),
    ("stable-diffusion-3", "sd3"),
    ("flux", "flux"),
)


def family_named(name: str) -> Family:
    """The family with this short name.

    Raises:
        ModelError: there is no such family (field "family").
    """
    family = FAMILIES.get(name)
    if family is None:
        raise ModelError(
            f"family is {name!r}, which is not a known model family.",
            f"Use one of: {', '.join(FAMILIES)}.",
            field="family",
        )
    return family


def family_of_architecture(architecture: str) -> Family | None:
    """The family a `modelspec.architecture` value stands for, or None when it is empty or of another kind of model."""
    lowered = architecture.lower()
    for start, name in _ARCHITECTURE_STARTS:
        if lowered.startswith(start):
            return FAMILIES[name]
    return None


def _shown(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{key}: {widths[key]}" for key in sorted(widths))


def supported_layouts() -> str:
    """One line that lists every family with its tensors and widths, for hints."""
    return "; ".join(f"{family.name} ({_shown(family.widths)})" for family in FAMILIES.values())


def family_of_tensors(
    widths: Mapping[str, int], *, architecture: str = "", declared: Mapping[str, int] | None = None
) -> Family:
    """The family that tensors of these widths belong to, cross-checked with what the file says of itself.

    Widths other than the family's own (a miniature text encoder) pass only where the file declares them.

    Args:
        widths: tensor key to its number of columns.
        architecture: the file's `modelspec.architecture`; "" when it has none.
        declared: the file's `apl.widths`; None when it has none.

    Raises:
        PrefixFileError: keys or widths fit no family, or contradict the architecture or the declaration.
    """
    if declared is not None and dict(declared) != dict(widths):
        raise PrefixFileError(
            f"apl.widths says {_shown(declared)}, but the tensors are {_shown(widths)}.",
            "The file was changed after it was saved: get it again from where you got it.",
            field="apl.widths",
        )
    named = family_of_architecture(architecture)
    if architecture and named is None:
        raise PrefixFileError(
            f"modelspec.architecture is {architecture!r}, which is no family this version knows.",
            f"Supported: {supported_layouts()}.",
            field="modelspec.architecture",
        )
    fitting = [family for family in FAMILIES.values() if dict(family.widths) == dict(widths)]
    if named is None:
        if fitting:
            return fitting[0]
        raise PrefixFileError(
            f"The tensors ({_shown(widths)}) fit no known model family.",
            f"Supported: {supported_layouts()}. Other widths need modelspec.architecture and apl.widths.",
            field="widths",
        )
    if set(named.widths) != set(widths):
        raise PrefixFileError(
            f"The file says it is for {named.label}, which has tensors {', '.join(sorted(named.widths))}, "
            f"but it holds {', '.join(sorted(widths))}.",
            "Its metadata and its tensors disagree about the family: get the file again, or convert the original.",
            field="modelspec.architecture",
        )
    if named not in fitting and declared is None:
        other = f" (they fit {fitting[0].label})" if fitting else ""
        raise PrefixFileError(
            f"The file says it is for {named.label} ({_shown(named.widths)}), "
            f"but its tensors have widths {_shown(widths)}{other}.",
            "Use a prefix trained for your model's family; a text encoder of another width must be declared "
            "in apl.widths.",
            field="widths",
        )
    return named
