"""How strongly a prefix acts: a straight line from a null prefix, which changes nothing, to the learned one.

P(s) = P0 + s (P - P0). Vectors of zeros are not nothing to a text encoder, and dropping the prefix shifts every word
to other positions; P0 is therefore learned too, as a prefix whose pictures are those of the prompt alone. What comes
out is a prefix like any other.
"""

from __future__ import annotations

import math

from .errors import ConfigError, PrefixFileError
from .prefix import AnonymizationPrompt

MOST = 2.0
"""Beyond 1 the line goes on past what was learned; nothing was measured beyond 2."""


def blend(null: AnonymizationPrompt, prompt: AnonymizationPrompt, strength: float) -> AnonymizationPrompt:
    """P0 + s (P - P0), with `prompt`'s metadata; scores are dropped, since they are not this prefix's.

    Args:
        null: P0 (preset `null`), of the same family, shape and placement, learned for the same model.
        strength: s; 0 gives `null`'s vectors, 1 those of `prompt`, exactly.

    Raises:
        ConfigError: strength is not a number from 0 to 2.
        PrefixFileError: the two prefixes do not belong together.
    """
    good = isinstance(strength, int | float) and not isinstance(strength, bool) and math.isfinite(strength)
    if not good or not 0 <= strength <= MOST:
        raise ConfigError(f"strength is {strength!r}, not a number from 0 to {MOST:g}.",
                          "0 changes nothing, 1 is the prefix as it was learned.", field="strength")
    for what, of_null, own in (
        ("family", null.family, prompt.family), ("number of vectors", null.num_tokens, prompt.num_tokens),
        ("widths", null.widths, prompt.widths), ("placement", null.meta.placement, prompt.meta.placement),
        ("base model", null.meta.base_model_sha256, prompt.meta.base_model_sha256),
    ):
        if of_null != own:
            raise PrefixFileError(f"The null prefix's {what} is {of_null}; {prompt.name} has {own}.",
                                  "Train a null prefix with the same settings and preset `null`.", field=what)
    tensors = {}
    for key, vectors in prompt.tensors.items():
        start = null.tensors[key]
        # the ends exactly, where a sum of products would be off by a rounding
        tensors[key] = vectors if strength == 1 else start + strength * (vectors - start)
    extra = {**prompt.meta.extra, "apl.strength": repr(float(strength)), "apl.null_sha256": null.content_hash}
    meta = prompt.meta.with_fields(title=f"{prompt.name} at {strength:g}", scores={}, extra=extra)
    return AnonymizationPrompt(prompt.family, tensors, meta)
