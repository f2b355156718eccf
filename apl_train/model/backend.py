"""A frozen Stable Diffusion model behind five verbs: encode, predict, to_latents, decode, sample.

Everything a model does here goes through diffusers' and transformers' own modules; this file batches and seeds. What
Stable Diffusion XL is told beyond words is in `conditioning.py`, the pipelines are in `pipelines.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apl_core.errors import DatasetError, ModelError
from apl_core.families import family_named
from apl_core.placement import LENGTH, negative_needs_prefix
from apl_core.side_by_side import side_by_side
from apl_train.model import conditioning, pipelines
from apl_train.model.files import Parts, read_parts
from apl_train.model.parts_check import check_parts
from apl_train.model.precision import Precision, chosen, into_half, out_of_half, vae_dtype
from apl_train.model.text import Encoded, TextStack, Vectors

_VAE_PIXELS = 2**18
"""Pixels in a pass of the VAE, whose memory grows with them: one picture of 512 x 512, sixteen of 128 x 128."""
_SMALL = 256
"""Edge of pictures up to which several batches are drawn at once on a CPU; of larger ones a batch fills all cores."""


@dataclass(frozen=True)
class Samples:
    """Generated pictures, row by row as the prompts were.

    Attributes:
        latents: float32 [N, 4, h, w] on the CPU, final latents as the UNet sees them (scaled).
        images: uint8 [N, H, W, 3], RGB; no rows when they were not decoded.
    """

    latents: Tensor
    images: np.ndarray


class Backend:
    """One model with frozen weights; see `load`.

    Attributes:
        name: of the file or folder.
        family: "sd1" or "sdxl".
        sha256: hash of the weights, lowercase hex: of the file, or of a folder's .safetensors files in sorted order.
        text: its tokenizers and text encoders.
        alphas_bar: float32 [1000], the noise schedule's cumulative alphas, by timestep.
        size: native edge of its pictures, in pixels.
        sizes: the six numbers that SDXL is told of every picture (see `conditioning`); None: its own size, no crop.
        zeros_for_empty_prompt: SDXL: whether an empty negative prompt means zeros, not its encoding (the model's
            `force_zeros_for_empty_prompt`).
    """

    def __init__(
        self, parts: Parts, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        checkpointing: bool = False, offload: str = "none", sizes: Sequence[int] | None = None,
    ) -> None:
        """Takes the modules over: they are moved, cast and frozen in place (see `Precision` for the settings).

        Raises:
            ModelError: the modules do not fit each other. ConfigError: `sizes` are none.
        """
        from diffusers import DDIMScheduler

        check_parts(parts)
        self.name, self.family, self.sha256 = parts.name, parts.family, parts.sha256
        self.device, self.dtype, self._offload = torch.device(device), dtype, offload
        self.sizes = conditioning.checked(sizes) if self.family == "sdxl" else None
        self.zeros_for_empty_prompt = self.family == "sdxl" and parts.zeros_for_empty_prompt
        waiting = "cpu" if offload == "all" else self.device
        self.unet, self.vae, *encoders = (
            _cast(part.to(place), kind).eval().requires_grad_(False)
            for part, place, kind in (
                (parts.unet, self.device, dtype),
                (parts.vae, self.device if offload == "none" else "cpu",
                 vae_dtype(dtype, self.family, parts.vae.config)),
                *((part, waiting, torch.float32) for part in (parts.text_encoder, parts.text_encoder_2)
                  if part is not None),
            )
        )
        if self.device.type == "cpu":
            self.unet.to(memory_format=torch.channels_last)  # about a tenth faster there; the VAE gains nothing
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()  # older versions of diffusers look at this; no layer of SD1's UNet behaves otherwise
        keys = tuple(family_named(self.family).widths)
        tokenizers = [parts.tokenizer, parts.tokenizer_2][: len(keys)]
        self.text = TextStack(self.family, dict(zip(keys, tokenizers, strict=True)),
                              dict(zip(keys, encoders, strict=True)))
        self._scheduler = DDIMScheduler(**parts.schedule)
        self._is_v = self._scheduler.config.prediction_type == "v_prediction"
        self.alphas_bar = self._scheduler.alphas_cumprod.float()
        self._factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size = int(self.unet.config.sample_size) * self._factor

    @classmethod
    def load(
        cls, source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
        checkpointing: bool = False, offload: str = "none", vae: str | Path | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Backend:
        """Read a model from disk. `source`, `vae`: see `files.read_parts`; the rest: see `Precision`.

        sizes: what SDXL is told of every picture's size; see `conditioning.Sizes`.

        Raises:
            ModelError: it is missing, of an unsafe or unsupported kind, damaged, or the device cannot take it.
        """
        parts = read_parts(source, dtype=dtype, vae=vae)
        try:
            return cls(parts, device=device, dtype=dtype, checkpointing=checkpointing, offload=offload, sizes=sizes)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"Cannot put {parts.name} on the device {str(device)!r} as {dtype}: {error}",
                             "Use device cpu, or free memory.", field="device") from error

    @classmethod
    def for_settings(cls, source: str | Path, settings: Any, *, device: str | torch.device | None = None) -> Backend:
        """Read a model as settings with device, dtype, gradient_checkpointing, offload, vae and size_conditioning ask
        for (TrainConfig).

        device: takes the place of the settings' own, as where several processes share a machine.
        """
        asked = precision_of(settings)
        return cls.load(source, device=device or asked.device, dtype=asked.dtype, checkpointing=asked.checkpointing,
                        offload=asked.offload, vae=settings.vae or None, sizes=settings.size_conditioning)

    def encode(self, prompts: Sequence[str], vectors: Vectors | None = None, **options: Any) -> Encoded:
        """tau([AP] (+) c): `TextStack.encode`."""
        return self.text.encode(prompts, vectors, **options)

    def predict(self, x_t: Tensor, t: Tensor, encoded: Encoded) -> Tensor:
        """eps_theta(x_t, tau(c), t) of N noisy latents: float32 [N, 4, h, w].

        x_t: float [N, 4, h, w], scaled latents; t: int64 [N]; gradient flows to `encoded`, not to weights. Of a model
        that predicts v = sqrt(abar) eps - sqrt(1 - abar) x_0, eps = sqrt(abar) v + sqrt(1 - abar) x_t.
        """
        x_t, t = x_t.to(self.device), t.to(self.device)
        states = into_half(encoded.states.to(self.device), self.dtype)
        sizes = conditioning.told(self.sizes, *(edge * self._factor for edge in x_t.shape[2:]))
        more = conditioning.added(encoded, sizes, self.device, self.dtype)
        found = out_of_half(self.unet(x_t.to(self.dtype), t, encoder_hidden_states=states, added_cond_kwargs=more,
                                      return_dict=False)[0])
        if not self._is_v:
            return found
        bar = self.alphas_bar.to(self.device)[t].view(-1, 1, 1, 1)
        return bar.sqrt() * found + (1 - bar).sqrt() * x_t.float()

    @contextlib.contextmanager
    def _working_vae(self) -> Iterator[Any]:
        """The VAE on the device; it goes back where it waits."""
        self.vae.to(self.device)
        try:
            yield self.vae
        finally:
            if self._offload != "none":
                self.vae.to("cpu")

    @torch.no_grad()
    def to_latents(self, images: np.ndarray) -> Tensor:
        """Scaled latents of pictures, the posterior's mode: uint8 [N, H, W, 3] -> float32 [N, 4, H/8, W/8] on the CPU.

        Raises:
            DatasetError: not uint8 RGB pictures with edges that the VAE divides.
        """
        right = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
        if not right or any(edge % self._factor or not edge for edge in images.shape[1:3]):
            raise DatasetError(
                f"The pictures are {images.dtype} {list(images.shape)}.",
                f"Use uint8 RGB pictures with edges that are multiples of {self._factor}.", field="image",
            )
        edges = [edge // self._factor for edge in images.shape[1:3]]
        out = torch.empty(len(images), self.vae.config.latent_channels, *edges)
        batch = self._vae_batch(*images.shape[1:3])
        with self._working_vae() as vae:
            for start in range(0, len(images), batch):
                part = torch.from_numpy(np.ascontiguousarray(images[start : start + batch]))
                pixels = part.permute(0, 3, 1, 2).to(self.device, vae.dtype) / 127.5 - 1
                mode = vae.encode(pixels).latent_dist.mode()
                out[start : start + batch] = mode * vae.config.scaling_factor
        return out

    @staticmethod
    def _vae_batch(height: int, width: int) -> int:
        return max(1, _VAE_PIXELS // (height * width))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures of scaled latents: float [N, 4, h, w] -> uint8 [N, 8h, 8w, 3], RGB."""
        height, width = (edge * self._factor for edge in latents.shape[2:])
        out = np.empty((len(latents), height, width, 3), np.uint8)
        batch = self._vae_batch(height, width)
        with self._working_vae() as vae:
            for start in range(0, len(latents), batch):
                part = latents[start : start + batch].to(self.device, vae.dtype)
                pixels = vae.decode(part / vae.config.scaling_factor, return_dict=False)[0].float()
                pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()
                out[start : start + batch] = pixels.permute(0, 2, 3, 1).byte().cpu().numpy()
        return out

    def _drawn(self, positive: Encoded, against: Encoded | None, noise: Tensor, decode: bool,
               **how: Any) -> tuple[Tensor, np.ndarray | None]:
        """Final latents [N, 4, h, w] of encoded prompts, and their pictures where they are wanted.

        By a pipeline of its own: those keep the state of a sampler, and several draw at once.
        """
        pipe = pipelines.guided(self.family, self.vae, self.unet, copy.deepcopy(self._scheduler), self.device)
        found = pipelines.draw(pipe, positive, against, noise, **how)
        return found.float().cpu(), self.decode(found) if decode else None

    def _against(self, negative: str, vectors: Vectors | None, like: Encoded) -> Encoded:
        """The negative prompt beside every row of `like`, in as many chunks."""
        if self.zeros_for_empty_prompt and not negative:
            return conditioning.zeros_like(like)
        chunks = like.states.shape[1] // LENGTH
        return conditioning.repeated(self.encode([negative], vectors, chunks=chunks), like)

    def _noise(self, seed: int, size: int) -> Tensor:
        edge = size // self._factor
        generator = torch.Generator("cpu").manual_seed(int(seed))
        return torch.randn(self.unet.config.in_channels, edge, edge, generator=generator)

    def _batches(self, prompts: Sequence[str], least: int, m: int, batch: int) -> Iterator[tuple[int, list[int]]]:
        """(chunks, rows) of prompts that take as many chunks: padding to a longer neighbour would change a picture."""
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(max(least, self.text.chunks_of(prompt, m)), []).append(row)
        for chunks, rows in sorted(groups.items()):
            for start in range(0, len(rows), batch):
                yield chunks, rows[start : start + batch]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        vectors: Vectors | None = None,
        steps: int = 20,
        guidance: float = 3.0,
        negative: str = "",
        size: int | None = None,
        batch: int = 16,
        progress: Callable[[int, int], None] | None = None,
        decode: bool = True,
    ) -> Samples:
        """Generate one picture a prompt with DDIM (diffusers' own pipeline); neither batch nor neighbours matter.

        Args:
            prompts, seeds: N texts and the seeds of their initial noise (drawn on the CPU, row by row).
            vectors: the prefix; the negative prompt carries it too where guidance below 1 makes that prompt add.
            steps: denoising steps.
            guidance: classifier-free guidance; at 1 the negative prompt has no part.
            negative: negative prompt; empty it means zeros where `zeros_for_empty_prompt`, which no prefix can enter.
            size: edge in pixels; the model's own by default.
            batch: rows a pass.
            progress: called with (pictures done, pictures in all) after every pass.
            decode: whether to make pictures of the latents.

        Raises:
            ConfigError: a number is out of range, or there are not as many seeds as prompts.
            PrefixFileError: the prefix does not fit the model.
        """
        size = self.size if size is None else size
        pipelines.check(prompts, seeds, steps, size, batch, self._factor)
        m, guided = self.text.num_prefix(vectors), guidance != 1.0
        with_prefix = vectors if negative_needs_prefix(guidance) else None
        least = self.text.chunks_of(negative, self.text.num_prefix(with_prefix)) if guided else 1
        latents = torch.empty(len(prompts), self.unet.config.in_channels, size // self._factor, size // self._factor)
        images = np.empty((len(prompts) if decode else 0, size, size, 3), np.uint8)
        how = {"steps": steps, "guidance": guidance, "sizes": conditioning.told(self.sizes, size, size),
               "pixels": (size, size)}
        # operations of a small model use a second core badly, batches side by side use it well
        abreast = torch.get_num_threads() if self.device.type == "cpu" and size <= _SMALL else 1
        turns, done = list(self._batches(prompts, least, m, batch)), 0
        for start in range(0, len(turns), abreast):
            some, ready = turns[start : start + abreast], []
            for chunks, rows in some:
                positive = self.encode([prompts[row] for row in rows], vectors, chunks=chunks)
                against = self._against(negative, with_prefix, positive) if guided else None
                ready.append((positive, against, torch.stack([self._noise(seeds[row], size) for row in rows])))
            made = side_by_side(lambda turn: self._drawn(*turn, decode, **how), ready)
            for (_, rows), (found, drawn) in zip(some, made, strict=True):
                latents[rows] = found
                if drawn is not None:
                    images[rows] = drawn
                done += len(rows)
                if progress:
                    progress(done, len(prompts))
        return Samples(latents, images)


def precision_of(settings: Any) -> Precision:
    """The `Precision` that a TrainConfig asks for. Raises ConfigError."""
    return chosen(settings.device, settings.dtype, checkpointing=settings.gradient_checkpointing,
                  offload=settings.offload)


def _cast(part: Any, dtype: torch.dtype) -> Any:
    """The part in `dtype`; nothing is asked of diffusers where it already is (it warns whatever the types are)."""
    return part if next(part.parameters()).dtype == dtype else part.to(dtype)
