"""Bad arguments are refused when the loss is built, with the values seen and the mend."""

import copy

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.utils.distributed import (
    DistributedLossWrapper,
    DistributedMinerWrapper,
)
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import ArgumentError, CloneError, S2SDError, UnsupportedLossError

LOSS, LINEAR, CONV = losses.TripletMarginLoss(), nn.Linear(12, 6), nn.Conv2d(3, 12, 1)


class Scaled(losses.TripletMarginLoss):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))


BAD = {
    "class": ((losses.TripletMarginLoss,), {}, ArgumentError, "is a class. Pass an instance"),
    "no_loss": ((3,), {}, ArgumentError, "loss=3"),
    "miner_class": ((LOSS, miners.HDCMiner), {}, ArgumentError, "Pass an instance"),
    "miner_layer": ((LOSS, LINEAR), {}, ArgumentError, "Linear is a layer.*embedder="),
    "miner_type": ((LOSS, "hard"), {}, ArgumentError, "miner='hard'"),
    "both": ((LOSS,), {"trunk": CONV}, ArgumentError, "Both embedder=Linear and trunk=Conv2d"),
    "embedder_type": ((LOSS,), {"embedder": "fc"}, ArgumentError, "embedder='fc'"),
    "nothing": ((LOSS,), {"embedder": None}, ArgumentError, "neither embedder nor trunk"),
    "trunk_only": (
        (LOSS,),
        {"embedder": None, "trunk": CONV},
        ArgumentError,
        "feature_dim=<width of the trunk",
    ),
    "conv_embedder": ((LOSS,), {"embedder": CONV}, ArgumentError, "does not start with nn.Linear"),
    "lazy": ((LOSS,), {"embedder": nn.LazyLinear(6)}, ArgumentError, "dimension is unknown"),
    "feature_dim_differs": ((LOSS,), {"feature_dim": 13}, ArgumentError, "13.*takes 12"),
    "feature_dim_type": ((LOSS,), {"feature_dim": 12.0}, ArgumentError, "feature_dim=12.0"),
    "dims_int": ((LOSS,), {"head_dims": 512}, ArgumentError, r"such as \(512, 1024\)"),
    "dims_zero": ((LOSS,), {"head_dims": (0,)}, ArgumentError, "above 0"),
    "dims_float": ((LOSS,), {"head_dims": (5.5,)}, ArgumentError, "5.5"),
    "dims_twice": ((LOSS,), {"head_dims": (8, 8)}, ArgumentError, r"\(8, 8\) repeats"),
    "distill_weight": ((LOSS,), {"distill_weight": -1}, ArgumentError, "distill_weight=-1"),
    "distill_weight_nan": (
        (LOSS,),
        {"distill_weight": float("nan")},
        ArgumentError,
        "distill_weight=nan",
    ),
    "distill_weight_type": (
        (LOSS,),
        {"distill_weight": "50"},
        ArgumentError,
        "distill_weight='50'",
    ),
    "feature_distill_weight": (
        (LOSS,),
        {"feature_distill_weight": -0.5},
        ArgumentError,
        "feature_distill_weight=-0.5",
    ),
    "temperature": ((LOSS,), {"temperature": 0}, ArgumentError, "temperature=0"),
    "temperature_type": ((LOSS,), {"temperature": None}, ArgumentError, "temperature=None"),
    "delay": ((LOSS,), {"feature_distill_delay": -1}, ArgumentError, "feature_distill_delay=-1"),
    "delay_float": (
        (LOSS,),
        {"feature_distill_delay": 1e3},
        ArgumentError,
        "feature_distill_delay=1000.0",
    ),
    "chunk": ((LOSS,), {"chunk_size": 0}, ArgumentError, "chunk_size=0"),
    "exclude_self": ((LOSS,), {"exclude_self": 1}, ArgumentError, "exclude_self=1"),
    "gather": ((LOSS,), {"gather_distributed": "yes"}, ArgumentError, "gather_distributed='yes'"),
    "pooling": ((LOSS,), {"pooling": "max"}, ArgumentError, "'max'.*'avg\\+max'"),
    "head": ((LOSS,), {"head": 3}, ArgumentError, "head=3"),
    "head_returns": ((LOSS,), {"head": lambda i, o: o}, ArgumentError, r"returned int"),
    "dict": (
        (losses.TripletMarginLoss(reducer=reducers.DoNothingReducer()),),
        {},
        UnsupportedLossError,
        "DoNothingReducer.*MeanReducer",
    ),
    "dict_inside": (
        (losses.MultipleLosses([LOSS, losses.NTXentLoss(reducer=reducers.DoNothingReducer())]),),
        {},
        UnsupportedLossError,
        "DoNothingReducer",
    ),
    "nested": (
        (S2SDLoss(LOSS, embedder=LINEAR, head_dims=(8,)),),
        {},
        UnsupportedLossError,
        "Wrap the loss once",
    ),
    "distributed": (
        (DistributedLossWrapper(LOSS),),
        {},
        UnsupportedLossError,
        "gather_distributed=True",
    ),
    "distributed_miner": (
        (LOSS, DistributedMinerWrapper(miners.HDCMiner())),
        {},
        UnsupportedLossError,
        "gather_distributed=True",
    ),
    "unknown_parameters": ((Scaled(),), {}, CloneError, r"'scale' of shape \(6,\).*factory"),
    "dims_none": ((LOSS,), {"head_dims": None}, ArgumentError, "head_dims=None"),
    "function": ((lambda e, y: 0,), {}, CloneError, "failed for dimension 6.*must be an nn.Module"),
    "factory_shares": ((lambda dim: LOSS,), {}, CloneError, "same TripletMarginLoss"),
    "heads_shared": (
        (LOSS,),
        {"head": lambda i, o: LINEAR, "head_dims": (6, 7)},
        CloneError,
        "head factory returned the same Linear",
    ),
    "miner_without_pairs": (
        (losses.VICRegLoss(), miners.HDCMiner()),
        {},
        ArgumentError,
        "VICRegLoss takes no pairs.*HDCMiner.*Leave the miner out",
    ),
    "miner_twice": (
        (losses.MultipleLosses([LOSS], [miners.HDCMiner()]), miners.HDCMiner()),
        {},
        ArgumentError,
        "has miners of its own",
    ),
    "factory_returns": ((lambda dim: dim,), {}, CloneError, "returned int for dimension 6"),
    "factory_size": (
        (lambda dim: LOSS,),
        {"embedder": None, "feature_dim": 12},
        ArgumentError,
        "embedding_size=",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    args, kwargs, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        S2SDLoss(*args, **{"embedder": LINEAR, "head_dims": (8,), **kwargs})
    assert isinstance(caught.value, S2SDError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "embedder",
    [
        LINEAR,
        nn.Sequential(nn.Flatten(), nn.Dropout(), LINEAR, nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.ReLU(), LINEAR)),
        nn.DataParallel(nn.Sequential(LINEAR)),
    ],
    ids=["linear", "sequential", "nested", "parallel"],
)
def test_the_feature_dimension_is_read_off_the_embedder(embedder):
    assert S2SDLoss(LOSS, embedder=embedder, head_dims=(8,)).feature_dim == 12


def test_feature_dim_is_enough_with_explicit_features_and_unneeded_without_heads():
    loss_func = S2SDLoss(LOSS, feature_dim=12, head_dims=(8,), feature_distill_delay=0)
    z = torch.randn(8, 6, requires_grad=True)
    loss_func(z, torch.arange(8) // 2, features=torch.randn(8, 12)).backward()
    transparent = S2SDLoss(LOSS, head_dims=(), feature_distill_weight=0)
    transparent(z, torch.arange(8) // 2).backward()


def test_a_feature_dim_given_is_taken_where_the_embedder_pools_or_reshapes():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    loss_func = S2SDLoss(LOSS, embedder=flat, feature_dim=3, head_dims=(8,))
    feature_map = torch.randn(8, 3, 2, 2)
    loss_func(flat(feature_map), torch.arange(8) // 2).backward()
    both = S2SDLoss(
        LOSS,
        embedder=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
        feature_dim=6,
        pooling=lambda m: torch.cat([m.mean((2, 3)), m.amax((2, 3))], 1),
        head_dims=(8,),
    )
    assert both.feature_dim == 6


def test_a_compiled_embedder_tells_its_width():
    compiled = torch.compile(nn.Linear(12, 6))
    assert S2SDLoss(LOSS, embedder=compiled, head_dims=(8,)).feature_dim == 12


def test_a_pooling_module_of_the_model_stays_the_models():
    pool = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loss_func = S2SDLoss(LOSS, feature_dim=3, pooling=pool, head_dims=(8,), feature_distill_delay=0)
    own = {id(p) for p in loss_func.parameters()}
    assert own.isdisjoint(id(p) for p in pool.parameters())
    assert copy.deepcopy(loss_func).pooling.module is pool
    z = torch.randn(8, 4, requires_grad=True)
    loss_func(z, torch.arange(8) // 2, features=torch.randn(8, 3, 2, 2)).backward()
    assert pool[0].weight.grad is not None


def test_numpy_and_tensor_numbers_are_numbers():
    loss_func = S2SDLoss(
        LOSS,
        embedder=LINEAR,
        head_dims=np.array([8, 9]),
        feature_distill_delay=np.int64(0),
        temperature=np.float32(0.5),
        chunk_size=np.int64(3),
        distill_weight=lambda step: np.float32(2.0),
        feature_distill_weight=lambda step: torch.tensor(2.0),
    )
    loss_func(LINEAR(torch.randn(8, 12)), torch.arange(8) // 2).backward()
    assert loss_func.head_dims == (8, 9)


def test_a_factory_with_a_size_given():
    loss_func = S2SDLoss(
        lambda dim: losses.ArcFaceLoss(4, dim), feature_dim=12, embedding_size=6, head_dims=(8,)
    )
    assert loss_func.loss.W.shape == (6, 4)
    assert loss_func.branches["head_8"].loss.W.shape == (8, 4)
