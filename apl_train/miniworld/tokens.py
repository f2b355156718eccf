"""The genuine CLIP byte-pair vocabulary (49,408 entries) as a transformers tokenizer folder.

The merges come from the MIT-licensed package `open_clip_torch`. The folder that was made of them ships with the
miniature checkpoint, and a rebuild takes it from there; only without it is the package needed.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

from apl_core.errors import ModelError

FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
SHIPPED = Path(__file__).with_name("assets") / "model" / "tokenizer"
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


def provide_tokenizer(folder: Path, shipped: Path = SHIPPED) -> None:
    """Fills `folder` with the four files: copies of the shipped ones, or from open_clip's list of merges.

    Raises:
        ModelError: there are neither shipped files nor the package.
    """
    if all((shipped / name).is_file() for name in FILES):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(shipped / name, folder / name)
        return
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ModelError(f"{shipped} is not there, and the package that the CLIP vocabulary comes from is missing.",
                         "Restore that folder, or pip install --no-deps open-clip-torch.", field="tokenizer")
    write_tokenizer(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), folder)


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
