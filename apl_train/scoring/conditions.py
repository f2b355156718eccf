"""The conditions of an evaluation: what a person's prompt is in each, and which vectors stand ahead of it.

Step persons -> prompts. "off" is the name alone, "on" the name with the prefix, "random" the name with vectors drawn at
random, of equal norms (is it the learning, or anything standing there?), "description" c2 alone (what perfect
anonymization would look like), "phrase" the name with the best hand-written words (what could be had without training).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from apl_core.errors import ScoreError
from apl_core.prefix import AnonymizationPrompt
from apl_train.scoring import drift
from apl_train.scoring.persons import PersonRecord

CONDITIONS = ("off", "on", "random", "description", "phrase")
WITH_VECTORS = ("on", "random")


def chosen_conditions(conditions: Sequence[str], phrase: str | None, with_prefix: bool) -> tuple[str, ...]:
    """Those to evaluate, in the order of `CONDITIONS`: "phrase" where words are given, `WITH_VECTORS` with a prefix.

    Raises:
        ScoreError: an unknown condition, no "off", or "phrase" without words.
    """
    for condition in conditions:
        if condition not in CONDITIONS:
            raise ScoreError(f"conditions has {condition!r}.", f"Use some of: {', '.join(CONDITIONS)}.",
                             field="conditions")
    if "off" not in conditions:
        raise ScoreError("conditions lacks off, to which everything else is compared.", "Add off.", field="conditions")
    if "phrase" in conditions and not (phrase or "").strip():
        raise ScoreError("conditions has phrase, but no phrase is given.", "Give `phrase` some words.", field="phrase")
    wanted = {*conditions, "phrase"} if phrase else set(conditions)
    return tuple(c for c in CONDITIONS if c in wanted and (with_prefix or c not in WITH_VECTORS))


def prompt_of(condition: str, person: PersonRecord, template: str, phrase: str | None) -> str:
    """c2 for "description", else c1; words stand ahead of it, or around the name where they have a place for it.

    template: c1, {} is the name. `replace`, not `format`: names and templates may hold other braces.
    """
    if condition == "description":
        return person.description
    if condition != "phrase":
        return template.replace("{}", person.name)
    if "{}" in phrase:
        return template.replace("{}", phrase.replace("{}", person.name))
    return f"{phrase} {template.replace('{}', person.name)}"


def tensors_of(vectors: AnonymizationPrompt | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A prefix's tensors by key, in the order of keys; none of None."""
    if vectors is None:
        return {}
    tensors = vectors.tensors if isinstance(vectors, AnonymizationPrompt) else vectors
    return {key: tensors[key].detach() for key in sorted(tensors)}


def vectors_by_condition(
    prompt_vectors: AnonymizationPrompt | Mapping[str, Tensor] | None, random_seed: int
) -> dict[str, Mapping[str, Tensor] | AnonymizationPrompt]:
    """What to encode with in each condition that has vectors, standing where the prefix itself stands."""
    learned = tensors_of(prompt_vectors)
    made = {"on": learned, "random": drift.random_vectors(learned, random_seed)} if learned else {}
    return {name: drift.standing_as(rows, prompt_vectors) for name, rows in made.items()}
