"""The reference: the miniature's text encoder through transformers alone, and its own chunker for the host's rules.

Nothing of the extension, of `apl_core` or of the host is used here, but the checkpoint's weights and the prefix's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = 49406, 49407
COMMA = ",</w>"


@dataclass(frozen=True)
class Rows:
    """A textual inversion's name: its vectors stand for the word."""

    name: str


@dataclass
class Reference:
    """CLIP with some rows more in its vocabulary, which is how any vector gets into it through token ids alone.

    `inversions` are the vectors, [n, width] each, that words of the prompts stand for.
    """

    model: CLIPTextModel
    tokenizer: CLIPTokenizer
    prefix: torch.Tensor
    inversions: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, prefix: torch.Tensor, inversions: Mapping[str, torch.Tensor] | None = None) -> Reference:
        config = yaml.safe_load((folder / "miniature-sd1.yaml").read_text("utf-8"))
        text = config["model"]["params"]["cond_stage_config"]["text_config"]
        model = CLIPTextModel(CLIPTextConfig(**text)).eval()
        held = load_file(folder / "miniature-sd1.safetensors")
        stem = "cond_stage_model.transformer."
        own = set(model.state_dict())
        weights = {}
        for key, value in held.items():
            if key.startswith(stem) and not key.endswith("position_ids"):
                name = key.removeprefix(stem)
                # transformers 5 took a level out of its names
                weights[name if name in own else name.removeprefix("text_model.")] = value.float()
        assert set(weights) == own, own ^ set(weights)
        model.load_state_dict(weights)
        return cls(model, CLIPTokenizer.from_pretrained(folder / "tokenizer"), prefix.float(), inversions or {})

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def chunks(self, parts: Sequence, on: bool, backtrack: int = 20) -> list[tuple[list, list[float]]]:
        """(entries, weights) of 75 - m positions a chunk; `parts` are (text or Rows, weight) pairs or "BREAK"."""
        room = 75 - (len(self.prefix) if on else 0)
        comma = self.tokenizer.convert_tokens_to_ids(COMMA)
        done: list[tuple[list, list[float]]] = []
        line: list[tuple[object, float]] = []

        def close(keep: int | None = None) -> None:
            nonlocal line
            kept, rest = (line, []) if keep is None else (line[:keep], line[keep:])
            done.append(([each for each, _ in kept], [weight for _, weight in kept]))
            line = rest

        for part in parts:
            if part == "BREAK":
                close()
                continue
            what, weight = part
            if isinstance(what, Rows):
                vectors = self.inversions[what.name][:room]
                if len(line) + len(vectors) > room:
                    close()
                line += [(row, weight) for row in vectors]
                continue
            for token in self.ids(what):
                if len(line) == room:
                    commas = [at for at, (entry, _) in enumerate(line) if isinstance(entry, int) and entry == comma]
                    near = bool(commas) and room - commas[-1] <= backtrack and token != comma
                    close(commas[-1] + 1 if near and backtrack else None)
                line.append((token, weight))
        if line or not done:
            close()
        return done

    def _hidden(self, batch: list[list], skip: int) -> torch.Tensor:
        """Last hidden states [n, 77, width] of lines whose entries are ids or vectors."""
        table = self.model.get_input_embeddings()
        plain = table.weight.data
        extra, lines = [], []
        for line in batch:
            ids = []
            for entry in line:
                if torch.is_tensor(entry):
                    ids.append(len(plain) + len(extra))
                    extra.append(entry.float())
                else:
                    ids.append(entry)
            lines.append(ids)
        table.weight.data = torch.cat([plain, torch.stack(extra)]) if extra else plain
        try:
            with torch.no_grad():
                out = self.model(input_ids=torch.tensor(lines), output_hidden_states=True)
                if skip <= 1:
                    return out.last_hidden_state
                inner = getattr(self.model, "text_model", self.model)
                return inner.final_layer_norm(out.hidden_states[-skip])
        finally:
            table.weight.data = plain

    def encode(self, texts: Sequence[Sequence], *, on: bool, skip: int = 1, emphasis: str = "Original",
               backtrack: int = 20) -> torch.Tensor:
        """[n, 77 * chunks, width] of a batch of texts, each a list of parts; shorter ones get empty chunks."""
        made = [self.chunks(parts, on, backtrack) for parts in texts]
        length = max(map(len, made))
        out = []
        for at in range(length):
            lines, weights = [], []
            for each in made:
                entries, weight = each[at] if at < len(each) else ([], [])
                head = list(self.prefix) if on else []
                line = [BOS, *head, *entries]
                lines.append(line + [EOS] * (77 - len(line)))
                weights.append([1.0] * (1 + len(head)) + weight + [1.0] * (76 - len(head) - len(weight)))
            z = self._hidden(lines, skip)
            w = torch.tensor(weights)[..., None]
            if emphasis == "Original":
                mean = z.mean()
                z = z * w
                z = z * (mean / z.mean())
            elif emphasis == "No norm":
                z = z * w
            out.append(z)
        return torch.cat(out, dim=1)
