"""The spaces of a batch: features found, projected and checked, and all ranks joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import distributed, validation
from .branches import Batch
from .capture import FeatureCapture
from .counter import is_compiling
from .heads import Pooling, pool
from .similarity import full_precision
from .teachers import TeacherWeight, has_weight
from .wrapper import LossWrapper


class Spaces(LossWrapper):
    """Turns what a loss is called with into embeddings of every space."""

    feature_dim: int | None
    feature_distill_weight: Any
    feature_distill_delay: int
    pooling: Pooling
    teacher_weight: TeacherWeight
    capture: FeatureCapture | None

    @property
    def _begun(self) -> bool | Tensor:
        return self.counter.has_reached(self.feature_distill_delay)

    @property
    def _distils(self) -> bool:
        """Whether a term needs features."""
        return bool(self.head_dims) or has_weight(self.feature_distill_weight)

    def _spaces(
        self,
        batch: Batch,
        gather: distributed.Gather,
        features: Tensor | None,
        ref_features: Tensor | None,
        teachers: Mapping[str, Tensor] | None,
    ) -> tuple[Batch, dict[str, Tensor]]:
        """The checked global batch in every space, ψ first, and the teachers that are no heads.

        These are φ, where it teaches, and the outside teachers, by the component of their KL.
        """
        (embeddings,), (ref_emb,), labels, indices_tuple, ref_labels = batch
        with gather.agreement(embeddings, labels, self):
            validation.check_settings(self)
            validation.check_batch(embeddings, labels, indices_tuple, ref_emb, self.loss)
            validation.check_matryoshka_dims(self.matryoshka_dims, embeddings.shape[1])
            gather.check_gatherable(indices_tuple, ref_emb)
            outside = self._outside.checked(teachers, self.teacher_weight, embeddings)
            φ = self._features(features, embeddings, "features")
            g = self._project(φ)
            gather.compare(self, outside)
        self._outside.remember(outside)
        ψ = full_precision(gather(embeddings))
        spaces = [*self._students(ψ), *(full_precision(x) for x in gather.joined(g))]
        refs: list[Tensor | None] = [None for _ in spaces]
        if ref_emb is embeddings:
            refs = [*spaces]
        elif ref_emb is not None:
            if g:
                validation.check_one_tower(embeddings, ref_emb, labels)
            ref_φ = self._features(ref_features, ref_emb, "ref_features") if g else None
            refs = [*self._students(ref_emb), *self._project(ref_φ)]
        others = {f"teacher_{name}": x for name, x in outside.items()}
        teaches = has_weight(self.feature_distill_weight) and (is_compiling() or self._begun)
        if φ is not None and teaches:
            others = {"feature_distill": φ, **others}
        joined = gather.joined([full_precision(x.detach()).to(ψ.dtype) for x in others.values()])
        others = dict(zip(others, joined, strict=True))
        return Batch(spaces, refs, gather(labels), indices_tuple, ref_labels), others

    def _features(self, features: Tensor | None, embeddings: Tensor, name: str) -> Tensor | None:
        """Pooled features φ of these embeddings: those given, or else those captured."""
        if not self._distils:
            return None
        if features is None:
            features = validation.check_capture(self.capture, name).features_of(embeddings, name)
        validation.check_rows(features, embeddings, name)
        return self._pooled(features, name)

    def _pooled(self, features: Tensor, name: str) -> Tensor:
        validation.check_floating(features, name)
        pooled = pool(features, self.pooling)
        validation.check_width(pooled, self.feature_dim, tuple(features.shape), name)
        return pooled

    def _students(self, embeddings: Tensor) -> list[Tensor]:
        """The embeddings, then their prefixes."""
        return [embeddings, *(embeddings[:, :k] for k in self.matryoshka_dims)]

    def _project(self, features: Tensor | None) -> list[Tensor]:
        """g_i(φ) of every head."""
        if features is None:
            return []
        parameter = next(self.branches.parameters(), None)
        if parameter is not None and parameter.device != features.device:
            self.to(features.device)  # as PML's losses move their parameters themselves
        return [self._branches[f"head_{d}"].project(features, d) for d in self.head_dims]
