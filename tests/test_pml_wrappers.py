"""Losses of pytorch-metric-learning that hold other losses, inside S2SDLoss.

Around every loss that they support it is ``tests/matrix`` that tries them.
"""

import pytest
import torch
from pml import CLASSES, SIZE
from pml_training import (
    BATCH,
    BY_ROWS,
    DIMS,
    FEATURES,
    hardest,
    in_cross_batch_memory,
    in_self_supervised,
    labels,
    train,
)
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import ArgumentError, BatchError, S2SDError, UnsupportedLossError


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "TripletMarginLoss"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_around_a_loss(name, symmetric):
    in_self_supervised(name, symmetric)


def test_self_supervised_is_called_as_before():
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss())
    loss_func = S2SDLoss(loss, feature_dim=FEATURES, head_dims=DIMS)
    z, view = torch.randn(2, BATCH, SIZE)
    φ, φ_view = torch.randn(2, BATCH, FEATURES)
    loss_func(z, view, features=φ, ref_features=φ_view)
    assert torch.equal(loss_func.components["base"], loss(z, view))
    with pytest.raises(S2SDError, match="SelfSupervisedLoss takes no labels"):
        loss_func(z, labels(), ref_emb=view, features=φ, ref_features=φ_view)


@pytest.mark.parametrize("name", ["ContrastiveLoss", "MultiSimilarityLoss", "TripletMarginLoss"])
@pytest.mark.parametrize("mined", ["no", "inside", "outside"])
def test_cross_batch_memory_around_a_loss(name, mined):
    in_cross_batch_memory(name, mined)


@pytest.mark.skipif(
    not hasattr(losses.GenericPairLoss, "_assert_either_pos_or_neg"), reason="came with PML 2.9"
)
@pytest.mark.parametrize("name", sorted(BY_ROWS))
def test_cross_batch_memory_around_a_matrix_loss_fails_on_pairs_from_outside(name):
    """PML takes their row numbers for places in the memory, where other rows are by then."""
    given, mixed = hardest(torch.randn(BATCH, SIZE)), torch.randperm(BATCH)

    def filled():
        loss = losses.CrossBatchMemory(getattr(losses, name)(), SIZE, memory_size=4 * BATCH)
        loss(torch.randn(BATCH, SIZE), labels()[mixed])
        return loss

    with pytest.raises(AssertionError, match="positive or negative"):
        filled()(torch.randn(BATCH, SIZE), labels(), given)
    loss_func = S2SDLoss(filled(), feature_dim=FEATURES, head_dims=DIMS)
    with pytest.raises(BatchError, match="CrossBatchMemory refused.*positive or negative"):
        loss_func(torch.randn(BATCH, SIZE), labels(), given, features=torch.randn(BATCH, FEATURES))


def test_cross_batch_memory_compares_pairs_from_outside_with_the_wrong_rows():
    """The same fault around a pair loss, without S2SD: nothing is raised."""
    loss = losses.CrossBatchMemory(losses.ContrastiveLoss(), SIZE, memory_size=4 * BATCH)
    called = []
    loss.loss.register_forward_pre_hook(lambda _, args: called.append(args))
    given, mixed = hardest(torch.randn(BATCH, SIZE)), torch.randperm(BATCH)
    for batch_labels in (labels()[mixed], labels()):
        loss(torch.randn(BATCH, SIZE), batch_labels, given)
    _, batch_labels, (anchors, positives, *_), _, memory_labels = called[-1]
    assert (batch_labels[anchors] != memory_labels[positives]).any()


def test_an_enqueue_mask_is_refused():
    loss_func = S2SDLoss(
        losses.CrossBatchMemory(losses.NTXentLoss(), SIZE), feature_dim=FEATURES, head_dims=DIMS
    )
    mask = torch.arange(BATCH) < BATCH // 2
    features = torch.randn(BATCH, FEATURES)
    with pytest.raises(BatchError, match="CrossBatchMemory takes no ref_emb.*enqueue_mask"):
        loss_func(torch.randn(BATCH, SIZE), labels(), None, mask, features=features)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("mined", ["no", "inside", "by S2SDLoss", "outside"])
def test_multiple_losses(as_dict, mined):
    parts = [losses.TripletMarginLoss(), losses.ProxyAnchorLoss(CLASSES, SIZE)]
    own = [miners.BatchHardMiner(), None] if mined == "inside" else None
    weights = [1, 0.5]
    if as_dict:
        parts, weights = dict(zip("ab", parts, strict=True)), {"a": 1, "b": 0.5}
        own = own and {"a": own[0]}
    elif own:
        own[1] = miners.HDCMiner()  # a list takes no gaps
    miner = miners.BatchHardMiner() if mined == "by S2SDLoss" else None
    train(losses.MultipleLosses(parts, own, weights), miner, given=mined == "outside")


def test_multiple_losses_with_miners_take_no_others():
    loss = losses.MultipleLosses([losses.TripletMarginLoss()], [miners.BatchHardMiner()])
    given = hardest(torch.randn(BATCH, SIZE))
    with pytest.raises(AssertionError):  # without words
        loss(torch.randn(BATCH, SIZE), labels(), given)
    loss_func = S2SDLoss(loss, feature_dim=FEATURES, head_dims=DIMS)
    with pytest.raises(BatchError, match="MultipleLosses refused.*an assertion failed"):
        loss_func(torch.randn(BATCH, SIZE), labels(), given, features=torch.randn(BATCH, FEATURES))
    with pytest.raises(ArgumentError, match="has miners of its own.*Leave the miner out"):
        S2SDLoss(loss, miners.BatchHardMiner(), feature_dim=FEATURES)


def test_wrappers_in_wrappers():
    inner = losses.CrossBatchMemory(losses.NTXentLoss(), SIZE, memory_size=2 * BATCH)
    train(losses.MultipleLosses([inner, losses.SoftTripleLoss(CLASSES, SIZE)]))


def test_a_distributed_loss_wrapper_is_refused():
    with pytest.raises(UnsupportedLossError, match="Pass the NTXentLoss.*gather_distributed=True"):
        S2SDLoss(DistributedLossWrapper(losses.NTXentLoss()), feature_dim=FEATURES)
    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):  # PML's own
        DistributedLossWrapper(S2SDLoss(losses.NTXentLoss(), feature_dim=FEATURES))
