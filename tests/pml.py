"""How to build and call every loss and miner of pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_metric_learning import losses, miners
from torch import nn

CLASSES, SIZE = 6, 8

NOT_LOSSES = {
    "BaseMetricLossFunction",
    "BaseLossWrapper",
    "EmbeddingRegularizerMixin",
    "WeightRegularizerMixin",
}
EMBEDDING_SIZED = {
    "ArcFaceLoss": ("W", 0),
    "CosFaceLoss": ("W", 0),
    "LargeMarginSoftmaxLoss": ("W", 0),
    "SphereFaceLoss": ("W", 0),
    "SubCenterArcFaceLoss": ("W", 0),
    "NormalizedSoftmaxLoss": ("W", 0),
    "SoftTripleLoss": ("fc", 0),
    "ProxyAnchorLoss": ("proxies", 1),
    "ProxyNCALoss": ("proxies", 1),
    "P2SGradLoss": ("weight", 0),
    "ManifoldLoss": ("proxies", 1),
}
# They have tests of their own: one keeps its graph between calls, one is abstract.
FAULTY = {"DynamicSoftMarginLoss", "GenericPairLoss"}
NO_INDICES_TUPLE = {
    "InstanceLoss",
    "ManifoldLoss",
    "P2SGradLoss",
    "PNPLoss",
    "RankedListLoss",
    "SelfSupervisedLoss",
    "VICRegLoss",
}
NO_REF_EMB = {
    *EMBEDDING_SIZED,
    "CrossBatchMemory",
    "FastAPLoss",
    "HistogramLoss",
    "InstanceLoss",
    "MultipleLosses",
    "NPairsLoss",
    "PNPLoss",
    "RankedListLoss",
    "SmoothAPLoss",
}
USUAL_MINER = {
    "AngularLoss": "AngularMiner",
    "ContrastiveLoss": "PairMarginMiner",
    "HistogramLoss": "UniformHistogramMiner",
    "LiftedStructureLoss": "HDCMiner",
    "MarginLoss": "DistanceWeightedMiner",
    "NCALoss": "BatchEasyHardMiner",
    "TripletMarginLoss": "TripletMarginMiner",
}
_SPECIAL: dict[str, Callable[[], nn.Module]] = {
    "P2SGradLoss": lambda: losses.P2SGradLoss(SIZE, CLASSES),
    "ManifoldLoss": lambda: losses.ManifoldLoss(SIZE, K=CLASSES),
    "CrossBatchMemory": lambda: losses.CrossBatchMemory(
        losses.ContrastiveLoss(), SIZE, memory_size=48
    ),
    "SelfSupervisedLoss": lambda: losses.SelfSupervisedLoss(losses.NTXentLoss()),
    "MultipleLosses": lambda: losses.MultipleLosses(
        [losses.TripletMarginLoss(), losses.ArcFaceLoss(CLASSES, SIZE)], weights=[1, 0.5]
    ),
    "HistogramLoss": lambda: losses.HistogramLoss(n_bins=20),
    "RankedListLoss": lambda: losses.RankedListLoss(margin=1.0, Tn=1.0),
    # nu: else as many active positives as negatives leave beta without gradient
    "MarginLoss": lambda: losses.MarginLoss(learn_beta=True, nu=0.1),
}


def exported(module: Any, *but: str) -> list[str]:
    """Every nn.Module class that a module of PML exports, but for those named."""
    return sorted(
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and name not in but
    )


def loss_names() -> list[str]:
    """Every loss class that pytorch_metric_learning.losses exports."""
    return exported(losses, *NOT_LOSSES)


def make_loss(name: str) -> nn.Module:
    """The loss for embeddings of SIZE and labels below CLASSES."""
    if name in _SPECIAL:
        return _SPECIAL[name]()
    if name in EMBEDDING_SIZED:
        return getattr(losses, name)(num_classes=CLASSES, embedding_size=SIZE)
    return getattr(losses, name)()


def miner_names() -> list[str]:
    """Every miner class that pytorch_metric_learning.miners exports."""
    return exported(miners, "BaseMiner")


def make_miner(name: str) -> nn.Module:
    """The miner with settings that suit a small batch."""
    arguments: dict[str, dict[str, Any]] = {
        "MultiSimilarityMiner": {"epsilon": 0.5},
        "HDCMiner": {"filter_percentage": 0.5},
        "UniformHistogramMiner": {"num_bins": 20},
        "PairMarginMiner": {"pos_margin": 0.2, "neg_margin": 0.8},
        "DistanceWeightedMiner": {"cutoff": 0.5, "nonzero_loss_cutoff": 1.9},
    }
    return getattr(miners, name)(**arguments.get(name, {}))


LOSSES = sorted(set(loss_names()) - FAULTY)
TAKE_PAIRS = sorted(set(LOSSES) - NO_INDICES_TUPLE)
TAKE_REFERENCES = sorted(set(LOSSES) - NO_REF_EMB)
