"""S2SD whose KL reaches less or more than the paper's, to measure what that choice is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sd_pml import S2SDLoss
from s2sd_pml.functional import relation_kl

WAYS = ("trunk", "embedder", "teachers")  # the first is the paper's


class OtherReach(S2SDLoss):
    """S2SD for a linear embedder, with the gradient of the KL going another way.

    Args:
        reach: "embedder" keeps it from the trunk. "teachers" lets it into the teachers as well,
            which are not detached then.
    """

    def __init__(
        self, *args: Any, reach: str, weight: Any, feature_weight: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, weight=0.0, feature_weight=0.0, **kwargs)  # the DML terms alone
        self.reach, self.weights = reach, (weight, feature_weight)

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Any = None
    ) -> Tensor:
        step = int(self.step)
        loss = super().forward(embeddings, labels, indices_tuple)
        if not self.training:
            return loss
        φ = self.capture.features_of(embeddings)
        γ, γ_f = (w(step) if callable(w) else w for w in self.weights)
        teachers = [*self.project(φ).values(), φ]
        if step < self.feature_delay:
            γ_f = 0.0
        weights = [γ / len(self.head_dims)] * len(self.head_dims) + [γ_f]
        if self.reach == "teachers":
            return loss + live_kl(
                embeddings, teachers, weights, self.temperature, self.exclude_self
            )
        embedder: nn.Linear = self.capture.module
        student = F.linear(φ.detach(), embedder.weight, embedder.bias)
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
