"""What an evaluation measures with: recogniser, attribute model, features for FID, CLIP; loaded when first needed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apl_core.errors import ConfigError, ScoreError
from apl_core.identity import FaceEmbedder, load_embedder
from apl_train import shipped
from apl_train.model.backend import Backend
from apl_train.scoring.attributes import AttributeReader
from apl_train.scoring.gallery import Gallery, build_gallery
from apl_train.scoring.persons import EvaluationSet, PersonRecord, read_evaluation_set
from apl_train.tables.clip_score import Clip, OnnxClip, OpenClip, TorchmetricsClip
from apl_train.tables.farl import FarlAttributes
from apl_train.tables.features import Extractor, Inception, Penultimate, average_cosine
from apl_train.tables.settings import EvaluateSettings

CLIP, ATTRIBUTES, INCEPTION = "clip", "attributes", "inception"
"""Names of features in cells and results."""


class Instruments:
    """The measuring models and persons of one evaluation. Raises what their loaders raise, when they are first used."""

    def __init__(self, settings: EvaluateSettings, base: Backend | None = None) -> None:
        self._settings = settings
        self._base = base
        self._galleries: dict[tuple[str, ...], Gallery] = {}

    @cached_property
    def people(self) -> EvaluationSet:
        return read_evaluation_set(shipped.locate("persons", self._settings.persons))

    @cached_property
    def embedder(self) -> FaceEmbedder:
        return load_embedder(shipped.recogniser(self._settings.recogniser))

    @cached_property
    def reader(self) -> AttributeReader | None:
        """Names attributes by class; only models with an attributes.json do."""
        where = self._settings.attributes
        if where in ("none", "farl"):
            return None
        return AttributeReader(shipped.locate("attributes", where))

    @cached_property
    def attributes(self) -> Extractor | None:
        """Facial attribute features for Attr-ACC (paper sec. 4.3, reference [33])."""
        where = self._settings.attributes
        if where == "none":
            return None
        return FarlAttributes(self._settings.device) if where == "farl" else Penultimate(
            shipped.locate("attributes", where))

    @cached_property
    def clip(self) -> Clip | None:
        kind, _, rest = self._settings.clip.partition(" ")
        if kind == "none":
            return None
        if kind == shipped.MINIATURE:
            return OnnxClip(shipped.locate("clip", kind), self._pooled)
        if kind == "open_clip" and len(rest.split()) == 2:
            return OpenClip(*rest.split(), download=self._settings.clip_download, device=self._device)
        if kind == "torchmetrics" and rest:
            return TorchmetricsClip(rest)
        raise ConfigError(f"clip is {self._settings.clip!r}.",
                          'Use miniature, none, "open_clip MODEL WEIGHTS" or "torchmetrics FOLDER".', field="clip")

    @cached_property
    def extractors(self) -> dict[str, Extractor]:
        """Features for FID by name; the first is the headline."""
        where = self._settings.features
        if where == "none":
            return {}
        if where != shipped.MINIATURE:
            return {INCEPTION: Inception(where, self._settings.resize, self._device)}
        found: dict[str, Extractor] = {CLIP: OnnxClip(shipped.locate("clip", shipped.MINIATURE), self._pooled)}
        if self.attributes is not None:
            found[ATTRIBUTES] = self.attributes
        return found

    @property
    def _device(self) -> str:
        device = self._settings.device
        return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device

    @cached_property
    def _text(self) -> Any:
        """(tokenizer, text encoder) of the shipped checkpoint, to which the miniature CLIP belongs."""
        base = self._base
        source = shipped.locate("base_model", shipped.MINIATURE)
        if base is None or self._settings.checkpoint != shipped.MINIATURE:
            base = Backend.load(source)
        return base.text.tokenizers["emb_params"], base.text.encoders["emb_params"]

    @torch.no_grad()
    def _pooled(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        tokenizer, encoder = self._text
        ids = tokenizer(list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        device = next(encoder.parameters()).device
        return encoder(input_ids=ids.input_ids.to(device)).pooler_output.float().cpu().numpy()

    def gallery(self, persons: Sequence[PersonRecord], people: EvaluationSet | None = None) -> Gallery:
        """References of these persons. Raises ScoreError for one with fewer than two."""
        key = tuple(p.name for p in persons)
        if key not in self._galleries:
            self._galleries[key] = build_gallery(people or self.people, persons, self.embedder)
        return self._galleries[key]

    def attribute_references(self, persons: Sequence[PersonRecord]) -> NDArray[np.float64]:
        """Mean of each person's normalised attribute features over the references: float64 [persons, d]."""
        if self.attributes is None:
            raise ScoreError("There is no attribute model.", "Set attributes.", field="attributes")
        rows = []
        for person in persons:
            features = self.attributes.features(self.people.references(person)).astype(np.float64)
            rows.append((features / np.linalg.norm(features, axis=1, keepdims=True)).mean(axis=0))
        return np.stack(rows)

    def attribute_ceiling(self, persons: Sequence[PersonRecord]) -> float:
        """Cosine of every reference with the mean of the person's others: what real pictures reach."""
        found = []
        for person in persons:
            features = self.attributes.features(self.people.references(person)).astype(np.float64)
            unit = features / np.linalg.norm(features, axis=1, keepdims=True)
            found += [float(average_cosine(row[None], (unit.sum(0) - row) / (len(unit) - 1))[0]) for row in unit]
        return float(np.mean(found))

    def hashes(self) -> Mapping[str, str]:
        """What a cell's key says of the measuring models."""
        return {"recogniser": self.embedder.sha256,
                "recogniser_settings": digest(getattr(self.embedder, "settings", {})),
                "reader": getattr(self.reader, "sha256", ""), "attributes": getattr(self.attributes, "sha256", ""),
                "clip": getattr(self.clip, "sha256", ""),
                "features": digest({k: [v.name, v.sha256] for k, v in self.extractors.items()})}

    def conventions(self) -> dict[str, Any]:
        """What every figure has to be read with."""
        s = self._settings
        return {"recogniser": f"{self.embedder.name}; sha256 {self.embedder.sha256[:12]}; a picture without a face has "
                              "no similarity and is counted apart",
                "sampler": f"DDIM, {s.steps} steps, guidance {s.guidance:g}", "c1": s.template,
                "attributes": getattr(self.attributes, "convention", "none"),
                "clip": getattr(self.clip, "convention", "none"),
                "fid_features": {k: v.convention for k, v in self.extractors.items()},
                "fid_distance": "cleanfid.fid.frechet_distance",
                "evaluation_set": f"sha256 {self.people.sha256[:12]}"}


def digest(value: Any) -> str:
    """SHA-256 of plain values, lowercase hex."""
    import json

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
