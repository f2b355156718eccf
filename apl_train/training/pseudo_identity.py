"""Pseudo-identities: faces that belong to nobody, bound to new words, for S_ID to hold more than names.

DreamBooth and textual inversion bind a person to a new word after the prefix was learned; a prefix that met names only
lowers such likeness little (paper sec. 4.4: 0.53 to 0.43). So faces of fictional persons are bound to words by textual
inversion (Gal et al. 2022: the word's vectors alone are learned, by the denoising loss) and become rows of S_ID: c1 is
"A photo of <face-1a2b3c4d>" or "... <face-1a2b3c4d> woman", as DreamBooth names people, c2 the picture's description.

A folder of them is an S_ID folder with one more file, `words.safetensors`. A word is named by the hash of its vectors,
so that cached states of captions with it never belong to other vectors.
"""

from __future__ import annotations

import contextlib
import csv
import io
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apl_core.atomic import write_bytes, write_safetensors, write_text
from apl_core.errors import ConfigError, DatasetError, PrefixFileError
from apl_core.metadata import content_hash
from apl_core.prefix import parse_tensors, read_limited
from apl_train.datasets.dataset import COLUMNS, TABLE, Dataset
from apl_train.datasets.pictures import PictureFolder
from apl_train.model.backend import Backend
from apl_train.model.text import TextStack
from apl_train.seeds import step_generator
from apl_train.training.bank import add_noise

WORDS = "words.safetensors"
TEMPLATES = ("A photo of {}", "A portrait of {}", "A close-up photo of {}", "A close-up portrait of {}")
"""The paper's (sec. 4.1)."""
NOUNS = {"woman": ("female", "woman", "lady", "girl"), "man": ("male", "man", "gentleman", "boy")}
"""What a person is called, by words of a description."""


def noun_in(description: str) -> str:
    """"woman", "man", or "person" where a description says neither."""
    words = re.findall(r"\w+", description.lower())
    return next((noun for noun, said in NOUNS.items() if set(said) & set(words)), "person")


@dataclass(frozen=True)
class Inversion:
    """Settings of textual inversion. `start`: words whose embeddings the vectors start from, cut or repeated to k."""

    vectors: int = 2
    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 5e-3
    start: str = "person"
    seed: int = 0

    def __post_init__(self) -> None:
        for field, low, high in (("vectors", 1, 16), ("steps", 1, 1_000_000), ("batch_size", 1, 1024),
                                 ("learning_rate", 1e-8, 10.0)):
            if not low <= getattr(self, field) <= high:
                raise ConfigError(f"{field} is {getattr(self, field)!r}, not a number from {low} to {high}.",
                                  f"Set {field} in that range.", field=field)


def word_of(vectors: Tensor) -> str:
    """The word that stands for float [k, width] vectors: their content hash in angle brackets."""
    return f"<face-{content_hash({'emb_params': vectors})[:12]}>"


def read_words(folder: Path) -> dict[str, Tensor]:
    """Word -> float32 [k, width] of a folder of pseudo-identities.

    Raises:
        DatasetError: the file is missing or damaged, or a word is not named after its vectors.
    """
    path = folder / WORDS
    if not path.is_file():
        raise DatasetError(f"{folder} has no {WORDS}.", "Make the folder with `apl pseudo --out FOLDER`.",
                           field="pseudo")
    try:
        words = parse_tensors(read_limited(path), path.name)
    except PrefixFileError as error:
        raise DatasetError(f"{path} cannot be read: {error.message}", "Make the folder again.",
                           field="pseudo") from error
    for word, vectors in words.items():
        if vectors.ndim != 2 or word != word_of(vectors):
            raise DatasetError(f"{path} holds {word[:80]!r}, which is not named after its vectors.",
                               "Make the folder again.", field="pseudo")
    return words


def add_words(text: TextStack, words: Mapping[str, Tensor]) -> None:
    """Makes the words known to a model's text encoder. Raises as `TextStack.learn` does."""
    text.learn(words)


@contextlib.contextmanager
def _rows_learned(text: TextStack, words: Sequence[str], vectors: Tensor) -> Iterator[None]:
    """While it lasts, the embeddings of `words` come from vectors [n, k, width], and gradient flows to them."""
    flat = vectors.flatten(0, 1)
    first = text.tokenize(words[0])[0]

    def replace(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        row = args[0] - first
        inside = (row >= 0) & (row < len(flat))
        return torch.where(inside[..., None], flat.to(output)[row.clamp(0, len(flat) - 1)], output)

    handle = next(iter(text.encoders.values())).get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def invert(backend: Backend, latents: Sequence[Tensor], settings: Inversion,
           progress: Callable[[int, int], None] | None = None, *,
           nouns: Sequence[str] = ()) -> tuple[Tensor, list[float]]:
    """Textual inversion of n identities at once: vectors float32 [n, k, width], and the mean loss of every step.

    latents: of each identity float32 [pictures, 4, h, w], as `Backend.to_latents` gives them. Identities share batches
    but not gradients: each step draws `batch_size` of (identity, picture, timestep, noise, template). Half of the
    captions have the identity's noun behind the word, where there are `nouns`.
    """
    text, n = backend.text, len(latents)
    start = text.tokenize(settings.start)
    if not n or not start:
        raise ConfigError("There is nothing to learn words for." if not n else "start has no token.",
                          "Give at least one picture and a word to start from.", field="pseudo")
    ids = (start * settings.vectors)[: settings.vectors]
    g = step_generator(settings.seed, 0)
    rows = text.embedding_table()[ids].detach().float().cpu()
    # a little apart, so that the identities do not start as one
    vectors = torch.nn.Parameter(rows.repeat(n, 1, 1) + 0.01 * torch.randn(n, *rows.shape, generator=g))
    tag = content_hash({"emb_params": vectors.flatten(0, 1)})[:12]
    words = [f"<new-{tag}-{i}>" for i in range(n)]
    text.learn({word: vectors[i] for i, word in enumerate(words)})
    adam = torch.optim.Adam([vectors], lr=settings.learning_rate)
    losses = []
    with _rows_learned(text, words, vectors):
        for step in range(settings.steps):
            g, rng = step_generator(settings.seed, step + 1), random.Random(settings.seed * 1_000_003 + step)
            who = torch.randint(n, (settings.batch_size,), generator=g).tolist()
            t = torch.randint(1000, (settings.batch_size,), generator=g)
            x0 = torch.stack([latents[i][int(torch.randint(len(latents[i]), (), generator=g))] for i in who])
            noise = torch.randn(x0.shape, generator=g)
            called = [f"{words[i]} {nouns[i]}" if nouns and rng.random() < 0.5 else words[i] for i in who]
            prompts = [rng.choice(TEMPLATES).replace("{}", name) for name in called]
            found = backend.predict(add_noise(x0, noise, t, backend.alphas_bar), t, backend.encode(prompts))
            loss = (found - noise.to(found.device)).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
            if progress:
                progress(step + 1, settings.steps)
    return vectors.detach().clone(), losses


def identities(faces: Dataset, count: int) -> list[list[int]]:
    """Rows of up to `count` identities: a named person's pictures together, every unnamed face by itself.

    Of unnamed ones those with the longest descriptions first: c2 has to say how a face looks.
    """
    named: dict[str, list[int]] = {}
    for row, record in enumerate(faces.records):
        if record.kind == "id":
            named.setdefault(record.name, []).append(row)
    if named:
        return list(named.values())[:count]
    alone = [row for row, record in enumerate(faces.records) if record.kind == "face"]
    return [[row] for row in sorted(alone, key=lambda row: (-len(faces.records[row].c2), row))[:count]]


def make_pseudo(backend: Backend, faces: Dataset, out: Path, *, count: int = 16, settings: Inversion | None = None,
                progress: Callable[[int, int], None] | None = None) -> dict[str, list[int]]:
    """Binds faces of `faces` to new words and writes the folder that `TrainConfig.pseudo` names; word -> rows.

    faces: S_Reg (each unnamed face is an identity) or a set of fictional, consenting or licensed persons as S_ID.

    Raises:
        DatasetError: no face. ConfigError: `out` already holds a set.
    """
    settings = settings or Inversion()
    if (out / TABLE).exists():
        raise ConfigError(f"{out} already holds a set.", "Choose another folder.", field="out")
    rows = identities(faces, count)
    if not rows:
        raise DatasetError(f"{faces.folder} shows no face.", "Use a set with rows of kind face or id.", field="faces")
    latents = [backend.to_latents(faces.images(of_one)) for of_one in rows]
    nouns = [noun_in(faces.records[of_one[0]].c2) for of_one in rows]
    vectors, _ = invert(backend, latents, settings, progress, nouns=nouns)
    words = {word_of(one): one.contiguous() for one in vectors}
    pictures = PictureFolder(faces.folder)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    try:
        for i, (word, of_one) in enumerate(zip(words, rows, strict=True)):
            for row in of_one:
                record = faces.records[row]
                name = f"{word.strip('<>')}-{row}{Path(record.image).suffix}"
                write_bytes(out / name, pictures.read(record.image))
                # every other one as DreamBooth would say it
                called = f"{word} {nouns[i]}" if (i + row) % 2 else word
                prompt = TEMPLATES[i % len(TEMPLATES)].replace("{}", called)
                writer.writerow([name, word, prompt, record.c2, "id"])
    finally:
        pictures.close()
    write_safetensors(out / WORDS, words, {})
    write_text(out / TABLE, table.getvalue())
    return dict(zip(words, rows, strict=True))
