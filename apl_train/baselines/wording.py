"""Names in prompts: the sentences that stand for a person on the list, where a name's tokens are, who is mentioned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from apl_core.errors import ConfigError
from apl_core.placement import LENGTH
from apl_train.baselines.protocol import Person
from apl_train.model.backend import Backend

TEMPLATES = ("{}", "A photo of {}", "A portrait of {}", "A close-up portrait of {}")
"""How a listed person is asked for while a method is prepared; all methods see the same sentences."""


@dataclass(frozen=True)
class Mention:
    """A prompt with a name in it, encoded alone in one chunk of 77 rows.

    start, end: rows of the name's tokens, end excluded; eos: the row of the end-of-text token.
    """

    person: Person
    prompt: str
    start: int
    end: int
    eos: int


def eos_row(backend: Backend, prompt: str) -> int:
    """The row of the end-of-text token in a prompt's first chunk."""
    return min(1 + len(backend.text.tokenize(prompt)), LENGTH - 1)


def mentions(backend: Backend, persons: Sequence[Person], templates: Sequence[str] = TEMPLATES) -> list[Mention]:
    """Every person in every template. Raises ConfigError for a prompt that does not fit one chunk."""
    found = []
    for person in persons:
        size = len(backend.text.tokenize(person.name))
        for template in templates:
            prompt = template.replace("{}", person.name)
            start = 1 + len(backend.text.tokenize(template.partition("{}")[0].strip()))
            eos = eos_row(backend, prompt)
            if start + size > LENGTH - 1:
                raise ConfigError(f"The prompt with the name {person.name[:40]!r} does not fit into {LENGTH} tokens.",
                                  "Shorten the name.", field="name")
            found.append(Mention(person, prompt, start, start + size, eos))
    return found


def named_in(prompt: str, persons: Sequence[Person]) -> tuple[Person, ...]:
    """Whose names stand in a prompt as whole words, whatever their case."""
    text = " ".join(prompt.casefold().split())
    return tuple(p for p in persons
                 if re.search(rf"(?<!\w){re.escape(' '.join(p.name.casefold().split()))}(?!\w)", text))


def aligned_rows(mention: Mention, anchor: Tensor, anchor_eos: int) -> tuple[list[int], list[int]]:
    """Rows of a mention and the rows of its anchor that they should become, both as indices into 77 rows.

    The name's tokens go to the anchor's last token; what follows goes from the end-of-text token on to the end, side by
    side. Rows of the sentence ahead of the name stay out of it.
    """
    last = len(anchor) - 1
    after = list(range(mention.end, LENGTH))
    own = list(range(mention.start, mention.end))
    to = [max(anchor_eos - 1, 0)] * len(own)
    return own + after, to + [min(anchor_eos + row - mention.eos, last) for row in after]
