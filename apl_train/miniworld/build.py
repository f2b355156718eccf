"""The parts of the miniature world, from packages: pictures, the generative models, the models that measure.

Each trains what is not there yet and goes on where it was cut off; `stages` builds them in order and exports them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from apl_core.atomic import write_json, write_safetensors
from apl_train.miniworld import (
    autoencoder,
    denoiser,
    denoiser_xl,
    doubles,
    presence,
    recogniser,
    restyle,
    steady,
    text_tower,
)
from apl_train.miniworld.captions import Captioner
from apl_train.miniworld.tokens import provide_tokenizer
from apl_train.miniworld.world import read_people, read_pictures, render_world


@dataclass(frozen=True)
class Lengths:
    """Optimizer steps of every training stage; see docs/miniworld.md for how the shipped world differs."""

    vae: int = 2000
    text: int = 1000
    unet: int = 4800
    unet_alone: int = 7600
    steady: int = 2000
    text2: int = 420
    unet_xl: int = 3000
    recogniser: int = 2600
    recogniser2: int = 1000
    attributes: int = 900
    presence: int = 400


class Build:
    """One build in one work folder; every part is a cached property that trains what is not there yet."""

    def __init__(self, work: Path, lengths: Lengths | None = None, minutes: float | None = None,
                 compiled: bool = False):
        self.work, self.lengths, self.minutes, self.compiled = work, lengths or Lengths(), minutes, compiled
        self.fits, self.drawn = work / "fit", work / "world"

    # -- data ------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self):
        from transformers import CLIPTokenizer

        folder = self.work / "tokenizer"
        if not (folder / "tokenizer_config.json").exists():
            provide_tokenizer(folder)
        return CLIPTokenizer.from_pretrained(folder)

    def render(self) -> None:
        render_world(self.drawn, lambda text: len(self.tokenizer(text, add_special_tokens=False).input_ids))

    @cached_property
    def people(self):
        return read_people(self.drawn / "people.jsonl")

    def pictures(self, name: str) -> tuple[np.ndarray, list[dict]]:
        return read_pictures(self.drawn, name)

    @cached_property
    def pairs(self) -> text_tower.Pairs:
        faces, face_rows = self.pictures("faces")
        things, thing_rows = self.pictures("things")
        names = list(dict.fromkeys(r["name"] for r in thing_rows))
        return text_tower.Pairs(Captioner(self.tokenizer, self.people, names), faces, face_rows, things, thing_rows,
                                self.left_out)

    @cached_property
    def left_out(self) -> frozenset[int]:
        """Doubles who look like their person."""
        path = self.drawn / "left_out.json"
        if not path.exists():
            write_json(path, doubles.look_alikes(self.recogniser2, *self.pictures("faces")))
        return frozenset(json.loads(path.read_text(encoding="utf-8")))

    # -- the generative model --------------------------------------------------------------------------------

    @cached_property
    def vae(self):
        """Trained and normalised: latents x 0.18215 have mean 0 and deviation 1 in every channel."""
        faces, things = self.pictures("faces")[0], self.pictures("things")[0]
        vae = autoencoder.train_vae(self.fits, faces, things, steps=self.lengths.vae, batch=8, minutes=self.minutes)
        some = np.concatenate([faces[::25], things[::20]])
        denoiser.normalise_latents(vae, autoencoder.to_pixels(some))
        return vae

    @cached_property
    def text(self):
        """(text model, picture tower, head)."""
        return text_tower.train_text_tower(self.fits, self.pairs, steps=self.lengths.text, minutes=self.minutes)

    @cached_property
    def latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled latents of (faces, things), float32 [N, 4, 16, 16]."""
        path = self.work / "latents.safetensors"
        if not path.exists():
            parts = {k: denoiser.encode_all(self.vae, self.pictures(k)[0]).half() for k in ("faces", "things")}
            write_safetensors(path, parts)
        parts = load_file(path)
        return parts["faces"].float(), parts["things"].float()

    @cached_property
    def unet(self):
        """Trained with the text tower, then alone, when a step costs less."""
        how = {"minutes": self.minutes, "compiled": self.compiled}
        both = denoiser.train_unet(self.fits, self.pairs, self.text[0], *self.latents, steps=self.lengths.unet, **how)
        return denoiser.train_unet(self.fits, self.pairs, self.text[0], *self.latents, steps=self.lengths.unet_alone,
                                   batch=64, name="unet-alone", start=both, seed=7, twins=32, **how)

    @cached_property
    def tower(self):
        """The text tower as it ships: after the UNet, which it was trained with, its last lesson."""
        _ = self.unet  # comes first: its training has a word on the tower too
        return steady.train_steady(self.fits, self.pairs.captioner, self.text[0], steps=self.lengths.steady,
                                   minutes=self.minutes)

    # -- the miniature SDXL ----------------------------------------------------------------------------------

    @cached_property
    def text2(self):
        """(second text model, picture tower, head)."""
        return text_tower.train_text_tower(self.fits, self.pairs, steps=self.lengths.text2, minutes=self.minutes,
                                           second=True)

    @cached_property
    def resized(self) -> denoiser_xl.Resized:
        return denoiser_xl.resized(self.vae, self.pictures("faces")[0])

    @cached_property
    def unet_xl(self):
        """(UNet, second text model) of the miniature SDXL."""
        first, second, unet = self.tower, self.text2[0], self.unet
        return denoiser_xl.train_unet_xl(self.fits, self.pairs, first, second, unet, *self.latents, self.resized,
                                         steps=self.lengths.unet_xl, minutes=self.minutes, compiled=self.compiled)

    # -- relatives of the first miniature --------------------------------------------------------------------

    @cached_property
    def restyled(self) -> tuple[text_tower.Pairs, tuple[torch.Tensor, torch.Tensor]]:
        """(pairs, scaled latents of (faces, things)) in the other rendering style."""
        pairs = restyle.restyled_pairs(self.pairs, self.pictures("things")[1])
        path = self.work / "latents-restyled.safetensors"
        if not path.exists():
            parts = {"faces": denoiser.encode_all(self.vae, pairs.faces).half(),
                     "things": denoiser.encode_all(self.vae, pairs.things).half()}
            write_safetensors(path, parts)
        parts = load_file(path)
        return pairs, (parts["faces"].float(), parts["things"].float())

    # -- the measuring models --------------------------------------------------------------------------------

    def _recogniser(self, shape: recogniser.Shape, steps: int) -> recogniser.Recogniser:
        pictures, rows = self.pictures("identities")
        return recogniser.train_recogniser(self.fits, pictures, rows, shape, steps=steps, minutes=self.minutes)

    @cached_property
    def recogniser(self) -> recogniser.Recogniser:
        return self._recogniser(recogniser.FIRST, self.lengths.recogniser)

    @cached_property
    def recogniser2(self) -> recogniser.Recogniser:
        return self._recogniser(recogniser.SECOND, self.lengths.recogniser2)

    @cached_property
    def attributes(self) -> presence.Looker:
        return presence.train_attributes(self.fits, [self.pictures("faces"), self.pictures("identities")],
                                         steps=self.lengths.attributes, minutes=self.minutes)

    @cached_property
    def presence(self) -> presence.Looker:
        return presence.train_presence(self.fits, self.pictures("faces")[0], self.pictures("things")[0],
                                       steps=self.lengths.presence, minutes=self.minutes)
