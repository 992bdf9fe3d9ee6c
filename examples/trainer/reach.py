"""S2SD whose gradients reach less or more than the paper's, to measure what that is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sd_pml import S2SDLoss
from s2sd_pml.functional import relation_kl
from s2sd_pml.similarity import full_precision

PAPERS = "trunk"
WAYS = (PAPERS, "embedder", "teachers", "detached")


class OtherReach(S2SDLoss):
    """S2SD for a linear embedder, with gradients going another way.

    Args:
        reach: "embedder" keeps the gradient of the KL from the trunk. "teachers" lets it into the
            teachers as well, which are not detached then. "detached" keeps that of the base loss
            from the trunk too: the embedder sees detached features, and the heads alone train the
            trunk.
    """

    def __init__(
        self,
        *args: Any,
        reach: str,
        distill_weight: Any,
        feature_distill_weight: Any,
        **kwargs: Any,
    ) -> None:
        weights = (distill_weight, feature_distill_weight)
        γ, γ_f = weights if reach == "detached" else (0.0, 0.0)  # the KL is computed here
        super().__init__(*args, distill_weight=γ, feature_distill_weight=γ_f, **kwargs)
        self.reach, self.weights = reach, weights

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Any = None
    ) -> Tensor:
        if not self.training:
            return super().forward(embeddings, labels, indices_tuple)
        φ = self.capture.features_of(embeddings)
        embedder: nn.Linear = self.capture.module
        student = F.linear(φ.detach(), embedder.weight, embedder.bias)
        if self.reach == "detached":
            return super().forward(student, labels, indices_tuple, features=φ)

        γ, γ_f = (w(self.step) if callable(w) else w for w in self.weights)
        weights = [γ / len(self.head_dims)] * len(self.head_dims)
        teachers = list(self.project(φ).values())
        if γ_f and self.step >= self.feature_distill_delay:
            teachers, weights = [*teachers, φ], [*weights, γ_f]
        loss = super().forward(embeddings, labels, indices_tuple)  # the DML terms
        settings = {"temperature": self.temperature, "exclude_self": self.exclude_self}
        if self.reach == "teachers":
            kl = live_kl(embeddings, teachers, **settings)
        else:
            kl = relation_kl(student, teachers, **settings)
        if len(teachers) > len(self.head_dims):
            self.components["feature_distill"] = kl[-1].detach()
        return loss + (kl * kl.new_tensor(weights)).sum()


def live_kl(
    student: Tensor, teachers: Sequence[Tensor], temperature: float, exclude_self: bool
) -> Tensor:
    """``relation_kl``, with a gradient for the teachers as well."""
    kept = ~torch.eye(len(student), dtype=torch.bool, device=student.device) | (not exclude_self)

    def log_relations(x: Tensor) -> Tensor:
        x = F.normalize(full_precision(x), dim=1)
        return ((x @ x.T)[kept].view(len(x), -1) / temperature).log_softmax(dim=1)

    with torch.autocast(student.device.type, enabled=False):
        own = log_relations(student)
        divergences = [
            temperature**2 * F.kl_div(own, log_relations(t), log_target=True, reduction="batchmean")
            for t in teachers
        ]
        return torch.stack(divergences)
