"""The genuine CLIP byte-pair vocabulary (49,408 entries) as a transformers tokenizer folder.

The merges come from the MIT-licensed package `open_clip_torch`; `apl miniworld build` writes them once, and the
folder ships with the miniature checkpoint.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

MERGES = 49152 - 256 - 2
"""Number of merges that CLIP uses of the list."""


def byte_alphabet() -> list[str]:
    """CLIP's 256 printable stand-ins for bytes, in vocabulary order (GPT-2's byte encoder)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    extra = 0
    for b in range(256):
        if b not in letters:
            letters[b] = chr(256 + extra)
            extra += 1
    ordered = printable + [b for b in range(256) if b not in set(printable)]
    return [letters[b] for b in ordered]


def write_tokenizer(merges_gz: Path, folder: Path) -> None:
    """merges_gz: `bpe_simple_vocab_16e6.txt.gz`. Writes vocab.json, merges.txt and the two small config files."""
    with gzip.open(merges_gz, "rt", encoding="utf-8") as packed:
        lines = packed.read().split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    alphabet = byte_alphabet()
    vocabulary = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    if len(vocabulary) != 49408:
        raise ValueError(f"{merges_gz} gives {len(vocabulary)} entries, CLIP has 49408")
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}
    ids = {t: i for i, t in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), "utf-8")
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
