"""A small model, and S2SD written out plainly as the twin that the tests compare with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sd_pml.similarity import cosines

B, F_DIM, D = 24, 12, 6
CPU_FLOAT16 = pytest.param(
    torch.float16,
    marks=pytest.mark.skipif(
        torch.__version__ < "2.4", reason="autocast on the CPU knows bfloat16 only"
    ),
    id="float16",
)


class Model(nn.Module):
    """Images (B, 3, 4, 4) -> map (B, F, 4, 4) -> pooled features (B, F) -> embeddings (B, D)."""

    def __init__(self, feature_dim: int = F_DIM, embedding_size: int = D) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, feature_dim, 1)
        self.embedder = nn.Linear(feature_dim, embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.embedder(self.trunk(images).mean(dim=(2, 3)))


class Custom(nn.Module):
    """A loss that does what it is given: the value, or a function of embeddings and labels."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, embeddings, labels, *indices_tuple):
        return self.value(embeddings, labels) if callable(self.value) else self.value


def images(batch: int = B, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 4, 4, dtype=dtype)


def labels(batch: int = B, per_class: int = 4) -> Tensor:
    return torch.arange(batch) // per_class


def plain_kl(teacher: Tensor, student: Tensor, temperature: float, exclude_self: bool) -> Tensor:
    """(T^2 / B) sum_i KL(softmax_i(cos(teacher) / T) || softmax_i(cos(student) / T))."""
    t, s = F.normalize(teacher.detach(), dim=1), F.normalize(student, dim=1)
    total = student.new_zeros(())
    for i in range(len(student)):
        others = [j for j in range(len(student)) if not (exclude_self and j == i)]
        p = torch.softmax((t @ t[i])[others] / temperature, dim=0)
        q = torch.softmax((s @ s[i])[others] / temperature, dim=0)
        total = total + (p * (p.log() - q.log())).sum()
    return temperature**2 / len(student) * total


def plain_s2sd(loss_func, embeddings, features_map, labels, step, indices_tuple=None):
    """The table of the paper's variants, read off an S2SDLoss's parts and settings."""
    features = features_map
    if features_map.ndim == 4:
        features = features_map.mean(dim=(2, 3))
        if loss_func.pooling == "avg+max":
            features = features + features_map.flatten(2).max(dim=2).values

    def branch(loss, miner, z, given):
        mined = given if given is not None else (miner(z, labels) if miner is not None else None)
        return loss(z, labels, mined)

    base = branch(loss_func.loss, loss_func.miner, embeddings, indices_tuple)
    branches = list(loss_func.branches.values())
    heads = [b.head(features) for b in branches]
    total = base
    t, e = loss_func.temperature, loss_func.exclude_self
    if heads:
        aux = [
            branch(b.loss, b.miner, z, indices_tuple if b.miner is None else None)
            for b, z in zip(branches, heads, strict=True)
        ]
        gamma = loss_func.distill_weight
        gamma = gamma(step) if callable(gamma) else gamma
        kl = [plain_kl(z, embeddings, t, e) for z in heads]
        total = 0.5 * (base + sum(aux) / len(aux)) + gamma * sum(kl) / len(kl)
    if step >= loss_func.feature_distill_delay:
        gamma_f = loss_func.feature_distill_weight
        gamma_f = gamma_f(step) if callable(gamma_f) else gamma_f
        if gamma_f:
            total = total + gamma_f * plain_kl(features, embeddings, t, e)
    return total


def cosine_block(spaces):
    """The similarity matrices of several spaces, (spaces, B, B)."""
    return torch.stack([cosines(x) for x in spaces])
