"""S2SD whose gradients reach less or more than the paper's, to measure what that is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sd_pml import S2SDLoss
from s2sd_pml.functional import relation_kl

WAYS = ("trunk", "embedder", "teachers", "detached")  # the first is the paper's


class OtherReach(S2SDLoss):
    """S2SD for a linear embedder, with gradients going another way.

    Args:
        reach: "embedder" keeps the gradient of the KL from the trunk. "teachers" lets it into the
            teachers as well, which are not detached then. "detached" keeps that of the base loss
            from the trunk too: the embedder sees detached features, and the heads alone train the
            trunk.
    """

    def __init__(
        self, *args: Any, reach: str, weight: Any, feature_weight: Any, **kwargs: Any
    ) -> None:
        self_made = reach != "detached"  # the KL is not S2SDLoss's own
        given = {} if self_made else {"weight": weight, "feature_weight": feature_weight}
        super().__init__(*args, **{"weight": 0.0, "feature_weight": 0.0, **given}, **kwargs)
        self.reach, self.weights = reach, (weight, feature_weight)

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

        γ, γ_f = (w(int(self.step)) if callable(w) else w for w in self.weights)
        γ_f *= int(self.step) >= self.feature_delay
        loss = super().forward(embeddings, labels, indices_tuple)  # the DML terms
        teachers = [*self.project(φ).values(), φ]
        weights = [γ / len(self.head_dims)] * len(self.head_dims) + [γ_f]
        if self.reach == "teachers":
            return loss + live_kl(
                embeddings, teachers, weights, self.temperature, self.exclude_self
            )
        settings = {"temperature": self.temperature, "exclude_self": self.exclude_self}
        return loss + relation_kl(student, teachers, weights=weights, **settings)[0]


def live_kl(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    exclude_self: bool,
) -> Tensor:
    """``relation_kl``'s total, with a gradient for the teachers as well."""
    kept = ~torch.eye(len(student), dtype=torch.bool) | (not exclude_self)

    def log_relations(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1)
        similarities = (x @ x.T)[kept.to(x.device)].view(len(x), -1)
        return (similarities / temperature).log_softmax(dim=1)

    own, total = log_relations(student), student.new_zeros(())
    for weight, teacher in zip(weights, teachers, strict=True):
        kl = F.kl_div(own, log_relations(teacher), log_target=True, reduction="batchmean")
        total = total + weight * temperature**2 * kl
    return total
