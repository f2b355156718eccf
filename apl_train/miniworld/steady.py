"""The text tower's last lesson: what stands ahead of a prompt that names nobody leaves its words as they are.

Step text tower, UNet -> text tower. Pictures teach the UNet to pass over words ahead of a prompt, as far as a UNet of
this size can; what reaches it of them comes through the states of the prompt's own tokens, which the tower moves.
Here the tower is taught to move them after a name alone. It is held to its own former states, so nothing else changes
and the UNet stays: names, with and without words ahead, and prompts by themselves.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_train.miniworld.captions import LIKE_ANYONE, LIKE_ANYTHING, RELATIONS, Captioner
from apl_train.miniworld.fit import fit
from apl_train.miniworld.people import draw_attributes
from apl_train.miniworld.text_tower import CONFIG

BOS, EOS, LENGTH = CONFIG["bos_token_id"], CONFIG["eos_token_id"], CONFIG["max_position_embeddings"]
ROOM = 60
"""Tokens of a prompt that stay behind what is put ahead of it."""
BATCH = {"said": 16, "plain": 12, "ahead_of_name": 12, "ahead_of_nobody": 24}


def encoded(text: nn.Module, embedded: Tensor) -> Tensor:
    """States float [N, 77, W] of token embeddings float [N, 77, W], as a prefix is put there."""
    inner = getattr(text, "text_model", text)
    handle = inner.embeddings.token_embedding.register_forward_hook(lambda *_: embedded)
    try:
        return text(input_ids=torch.zeros(embedded.shape[:2], dtype=torch.long)).last_hidden_state
    finally:
        handle.remove()


class Ahead:
    """Draws what stands ahead of prompts. table: token embeddings [vocabulary, W]."""

    def __init__(self, captioner: Captioner, table: Tensor) -> None:
        relations = (*RELATIONS, *LIKE_ANYONE, *LIKE_ANYTHING)
        self.table, self.others = table, captioner.filler_ids.tolist()
        self.words = sorted({i for r in relations for i in captioner.ids(r.replace("{}", " "))})

    def like_prefix(self, rng: random.Random) -> Tensor:
        """Mixtures of relations' words, as which a prefix begins: float [k, W], k from 1 to 14, mostly 10."""
        count = rng.randint(1, 14) if rng.random() < 0.25 else 10
        return torch.stack([self._mixture(rng) for _ in range(count)])

    def anything(self, rng: random.Random) -> Tensor:
        """The same, words of the vocabulary, or random vectors of the norms of mixtures: float [k, W]."""
        rows, kind = self.like_prefix(rng), rng.randrange(3)
        if kind == 1:
            return self.table[torch.tensor(rng.choices(self.others, k=len(rows)))]
        if kind == 2:
            noise = torch.tensor([rng.gauss(0, 1) for _ in range(rows.numel())]).reshape(rows.shape)
            return F.normalize(noise, dim=1) * rows.norm(dim=1, keepdim=True)
        return rows

    def _mixture(self, rng: random.Random) -> Tensor:
        ids = rng.choices(self.words, k=rng.randint(1, 3))
        weights = torch.tensor([rng.gauss(0, 1) for _ in ids])
        return (weights[:, None] * self.table[torch.tensor(ids)]).sum(0) * rng.uniform(1.0, 6.0)


def row(table: Tensor, ahead: Tensor, ids: Sequence[int]) -> Tensor:
    """Token embeddings [77, W]: BOS, rows ahead, the prompt's, EOS to the end."""
    said = torch.cat([table[BOS][None], ahead, table[torch.tensor(ids, dtype=torch.long)]])[: LENGTH - 1]
    return torch.cat([said, table[EOS].expand(LENGTH - len(said), -1)])


def unmoved(plain: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(states [N, 77, W] of prompts alone, moved on by `counts` places; bool [N, 77], where they are to be met).

    The rows ahead, BOS among them, may become what they like.
    """
    places = torch.arange(LENGTH)[None] - torch.tensor(counts)[:, None]
    target = plain.gather(1, places.clamp(min=0)[..., None].expand_as(plain))
    return target, places >= 1


def _nobody(captioner: Captioner, rng: random.Random) -> list[int]:
    """A prompt that names nobody, without fillers and relations."""
    kind = rng.random()
    if kind < 0.4:
        return captioner.thing(rng, rng.randrange(len(captioner.things)))[0]
    draw = captioner.described if kind < 0.67 else captioner.stranger
    return draw(rng, draw_attributes(rng))[0]


def train_steady(folder: Path, captioner: Captioner, text: nn.Module, *, steps: int, lr: float = 1e-3,
                 minutes: float | None = None) -> nn.Module:
    """Goes on training `text`, in place, and returns it frozen. Its token and position embeddings stay as they are."""
    former = copy.deepcopy(text).requires_grad_(False).eval()
    inner = getattr(text, "text_model", text)
    text.requires_grad_(True)
    inner.embeddings.requires_grad_(False)
    table = inner.embeddings.token_embedding.weight.detach()
    alone, none, ahead = captioner.alone(), table[:0], Ahead(captioner, table)
    named = range(len(captioner.people))

    def step(i: int, _: torch.Generator) -> dict[str, Tensor]:
        rng = random.Random(31_337 * i + 3)
        kept = []
        for _k in range(BATCH["said"]):
            index = rng.choice(named)
            ids, _claim = (captioner.person(rng, index, captioner.people[index].attributes, "") if rng.random() < 0.5
                           else captioner.double(rng, index))
            kept.append(row(table, none, ids))
        kept += [row(table, none, _nobody(alone, rng) + captioner.behind(rng)) for _k in range(BATCH["plain"])]
        for _k in range(BATCH["ahead_of_name"]):
            index = rng.choice(named)
            ids, _claim = alone.person(rng, index, captioner.people[index].attributes, "")
            kept.append(row(table, ahead.anything(rng), ids[:ROOM]))
        prompts = [_nobody(alone, rng)[:ROOM] for _k in range(BATCH["ahead_of_nobody"])]
        fronts = [ahead.like_prefix(rng) for _ in prompts]
        kept_rows = torch.stack(kept)
        with torch.no_grad():
            before = encoded(former, torch.cat([kept_rows, *[row(table, none, ids)[None] for ids in prompts]]))
        target, met = unmoved(before[len(kept) :], [len(rows) for rows in fronts])
        moved = torch.stack([row(table, rows, ids) for rows, ids in zip(fronts, prompts, strict=True)])
        now = encoded(text, torch.cat([kept_rows, moved]))
        keep = F.mse_loss(now[: len(kept)], before[: len(kept)])
        move = F.mse_loss(now[len(kept) :][met], target[met])
        return {"loss": keep + move, "keep": keep.detach(), "move": move.detach()}

    fit("steady", folder, {"text": text}, step, steps=steps, lr=lr, minutes=minutes, ema=0.99)
    return text.eval().requires_grad_(False)
