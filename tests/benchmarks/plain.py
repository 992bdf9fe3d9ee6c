"""What the benchmarks compare: the paper's equations written plainly with PML's own parts."""

from __future__ import annotations

import copy

from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from s2sd_pml.functional import relation_kl_reference

PAPER_HEAD_DIMS = (512, 1024, 1536, 2048)
LOSSES = {
    "MultiSimilarity with miner": lambda: (
        losses.MultiSimilarityLoss(),
        miners.MultiSimilarityMiner(),
    ),
    "Circle": lambda: (losses.CircleLoss(), None),
    "NTXent": lambda: (losses.NTXentLoss(), None),
    "SupCon": lambda: (losses.SupConLoss(), None),
    "Contrastive": lambda: (losses.ContrastiveLoss(), None),
}


class PlainS2SD(nn.Module):
    """1/2 [ L(ψ) + mean_i L(g_i(φ)) ] + γ mean_i KL(g_i(φ) -> ψ) + γ_f KL(φ -> ψ), nothing shared.

    It holds the heads of an S2SDLoss, whose γ and γ_f are constants here, and copies of a loss
    without parameters and its miner.
    """

    def __init__(
        self, loss: nn.Module, miner: nn.Module | None, heads: list[nn.Module], γ: float, γ_f: float
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.losses = nn.ModuleList(copy.deepcopy(loss) for _ in range(len(heads) + 1))
        self.miners = [copy.deepcopy(miner) for _ in self.losses]
        self.γ, self.γ_f = γ, γ_f

    def forward(self, embeddings: Tensor, labels: Tensor, features: Tensor) -> Tensor:
        projected = [head(features) for head in self.heads]
        base, *aux = (
            metric_loss(*parts, labels)
            for parts in zip(self.losses, self.miners, [embeddings, *projected], strict=True)
        )
        *kl, feature_kl = relation_kl_reference(embeddings, [*projected, features])
        distillation = self.γ * sum(kl) / len(kl) + self.γ_f * feature_kl
        return (base + sum(aux) / len(aux)) / 2 + distillation


def metric_loss(
    loss: nn.Module, miner: nn.Module | None, embeddings: Tensor, labels: Tensor
) -> Tensor:
    """PML's loss, on the pairs of its miner if there is one: the training step without S2SD."""
    return loss(embeddings, labels, None if miner is None else miner(embeddings, labels))
