"""Every loss and miner that pytorch-metric-learning exports trains inside S2SDLoss.

The lists come from the installed PML, so that a class that a later release adds is noticed here.
"""

import pytest
import torch
from pml import (
    BROKEN_IN_PML,
    CLASSES,
    NO_INDICES_TUPLE,
    SIZE,
    loss_names,
    make_loss,
    make_miner,
    miner_names,
)
from pytorch_metric_learning import losses, miners
from torch import nn

from s2sd_pml import S2SDLoss

BATCH, FEATURES, DIMS = CLASSES * 6, 10, (12, 20)


def cases(names):
    return [
        pytest.param(n, marks=pytest.mark.skip(reason=why), id=f"{n}-{why}")
        if (why := BROKEN_IN_PML.get(n))
        else n
        for n in names
    ]


def train(loss, miner=None, *, steps=3, dtype=torch.float32, autocast=False, given=False):
    """Some steps of S2SD, in which every parameter must move and every value be finite."""
    name = type(loss).__name__
    trunk, embedder = nn.Linear(5, FEATURES).to(dtype), nn.Linear(FEATURES, SIZE).to(dtype)
    loss_func = S2SDLoss(
        loss, miner, embedder=embedder, head_dims=DIMS, feature_delay=1, weight=1.0
    ).to(dtype)
    optimizer = torch.optim.SGD([*trunk.parameters(), *embedder.parameters()], lr=0.01)
    loss_func.add_to(optimizer)
    watched = dict(loss_func.named_parameters())
    before = {n: p.detach().clone() for n, p in watched.items()}
    labels = torch.arange(CLASSES).repeat_interleave(BATCH // CLASSES)
    for _ in range(steps):
        x = torch.randn(BATCH, 5, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            embeddings = embedder(trunk(x))
            args, kwargs = (labels,), {}
            if name in ("SelfSupervisedLoss", "VICRegLoss"):
                args, kwargs = (), {"ref_emb": embedder(trunk(x + 0.1 * torch.randn_like(x)))}
            elif name == "ManifoldLoss":
                args = ()
            if given:
                kwargs["indices_tuple"] = miners.BatchHardMiner()(embeddings.float(), labels)
            loss = loss_func(embeddings, *args, **kwargs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    assert (loss_func.components["feature_distill"] > 0) == (steps > 1)
    assert all(torch.isfinite(p).all() for p in loss_func.parameters())
    assert {p.dtype for p in loss_func.parameters()} == {dtype}
    still = {n for n, p in watched.items() if torch.equal(p, before[n])}
    if name == "VICRegLoss":  # does not see a shift of all embeddings
        still = {n for n in still if not n.endswith("output.bias")}
    assert not still
    assert all(watched[n] is p for n, p in loss_func.named_parameters())
    return loss_func


@pytest.mark.parametrize("name", cases(loss_names()))
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16_autocast"])
def test_every_loss_trains(name, autocast):
    train(make_loss(name), autocast=autocast)


@pytest.mark.parametrize("name", cases(loss_names()))
def test_every_loss_trains_in_float64(name):
    train(make_loss(name), dtype=torch.float64)


@pytest.mark.parametrize("name", cases(sorted(set(loss_names()) - NO_INDICES_TUPLE)))
@pytest.mark.parametrize("how", ["miner", "indices_tuple"])
def test_every_loss_that_takes_pairs_trains_with_mined_ones(name, how):
    if how == "miner":
        train(make_loss(name), miners.MultiSimilarityMiner(epsilon=0.5))
    else:
        train(make_loss(name), given=True)


@pytest.mark.parametrize("name", miner_names())
def test_every_miner_mines_in_each_branch(name):
    if name == "EmbeddingsAlreadyPackagedAsTriplets":
        assert BATCH % 3 == 0
    loss = losses.TripletMarginLoss(margin=0.5)
    loss_func = train(loss, make_miner(name))
    own = [loss_func.miner, *(b.miner for b in loss_func.branches.values())]
    assert len({id(m) for m in own}) == 1 + len(DIMS)


def test_cross_batch_memory_fills_once_a_step_in_every_branch():
    loss_func = train(make_loss("CrossBatchMemory"), steps=1)
    memories = [loss_func.loss, *(b.loss for b in loss_func.branches.values())]
    assert [m.embedding_memory.shape[1] for m in memories] == [SIZE, *DIMS]
    assert [m.queue_idx for m in memories] == [BATCH] * 3


@pytest.mark.parametrize("as_dict", [False, True])
def test_multiple_losses_with_miners_of_their_own(as_dict):
    parts = [losses.TripletMarginLoss(), losses.ProxyAnchorLoss(CLASSES, SIZE)]
    mined = [miners.BatchHardMiner(), None]
    if as_dict:
        loss = losses.MultipleLosses(
            dict(zip("ab", parts, strict=True)), {"a": mined[0]}, {"a": 1, "b": 2}
        )
    else:
        loss = losses.MultipleLosses([parts[0], parts[1]], [mined[0], miners.HDCMiner()])
    train(loss)
