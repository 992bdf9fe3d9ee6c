"""gather_distributed on gloo ranks equals one process that holds the whole batch."""

from __future__ import annotations

import functools
import unittest.mock

import pytest
import torch
from helpers import F_DIM, D, Model, images, labels
from processes import on_ranks
from pytorch_metric_learning import losses, miners
from torch.nn.parallel import DistributedDataParallel

from s2sd_pml import S2SDLoss, distributed
from s2sd_pml.errors import DistributedError, S2SDError, S2SDWarning

CASES = {
    "pairs": lambda: (losses.ContrastiveLoss(), None),
    "triplets_mined": lambda: (losses.TripletMarginLoss(), miners.MultiSimilarityMiner()),
    "multi_similarity": lambda: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
    "proxies": lambda: (losses.ProxyAnchorLoss(6, D), None),
    "memory": lambda: (losses.CrossBatchMemory(losses.NTXentLoss(), D, 64), None),
}


class MeanOfProducts(torch.nn.Module):
    """A custom loss, without labels or parameters."""

    def forward(self, embeddings):
        return (embeddings @ embeddings.T).mean()


def build(case, **kwargs):
    torch.manual_seed(1)
    model = Model()
    loss, miner = CASES[case]()
    kwargs = {"head_dims": (8, 10), "feature_distill_delay": 1, "distill_weight": 5.0, **kwargs}
    return model, S2SDLoss(loss, miner, embedder=model.embedder, **kwargs)


def steps(model, loss_func, parts, rank, wrap, record):
    """Two steps of SGD on the rows of this rank; value, components and gradients of the last."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)
    trained, objective = wrap(model), wrap(loss_func)
    start = sum(parts[:rank])
    own = slice(start, start + parts[rank])
    for _ in range(2):
        x, y = images(sum(parts)), labels(sum(parts))
        optimizer.zero_grad()
        value = objective(trained(x[own]), y[own])
        value.backward()
        optimizer.step()
    record["value"] = value.detach()
    record.update({f"component {k}": v for k, v in loss_func.components.items()})
    named = [*model.named_parameters(), *loss_func.named_parameters()]
    record.update({f"grad {n}": p.grad for n, p in named})
    record.update({f"param {n}": p.detach() for n, p in named})
    record["step"] = torch.tensor(loss_func.step)


def train_rank(rank, *, plans):
    record = {}
    for name, (case, kwargs, parts) in plans.items():
        model, loss_func = build(case, gather_distributed=True, **kwargs)
        one = {}
        steps(model, loss_func, parts, rank, DistributedDataParallel, one)
        record.update({f"{name}/{k}": v for k, v in one.items()})
    return record


PLANS = {
    2: {
        "pairs": ("pairs", {}, (12, 12)),
        "triplets": ("triplets_mined", {"chunk_size": 5}, (12, 12)),
        "multi_similarity": (
            "multi_similarity",
            {"exclude_self": True, "temperature": 0.3},
            (12, 12),
        ),
        "proxies": ("proxies", {}, (12, 12)),
        "memory": ("memory", {}, (12, 12)),
        "uneven": ("multi_similarity", {"chunk_size": 3}, (16, 8)),
        "no_heads": ("proxies", {"head_dims": (), "feature_distill_weight": 0}, (12, 12)),
    },
    3: {
        "triplets": ("triplets_mined", {}, (8, 8, 8)),
        "uneven_proxies": ("proxies", {}, (5, 12, 7)),
    },
}


@pytest.mark.parametrize("world", PLANS)
def test_value_and_gradients_equal_one_process_with_the_whole_batch(world):
    plans = PLANS[world]
    ranks = on_ranks(functools.partial(train_rank, plans=plans), world)
    for name, (case, kwargs, parts) in plans.items():
        expected = {}
        model, loss_func = build(case, **kwargs)
        steps(model, loss_func, [sum(parts)], 0, lambda module: module, expected)
        assert expected["grad trunk.weight"].abs().sum() > 0
        for rank in ranks:
            got = {k.split("/")[1]: v for k, v in rank.items() if k.startswith(f"{name}/")}
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(
                    torch.from_numpy(got[key]),
                    value.detach(),
                    rtol=1e-4,
                    atol=2e-6,
                    msg=lambda m, where=f"{name} {key}": f"{where}: {m}",
                )


def margin_rank(rank):
    torch.manual_seed(1)
    model = Model()
    loss_func = S2SDLoss(
        losses.MarginLoss(learn_beta=True),
        embedder=model.embedder,
        head_dims=(8,),
        gather_distributed=True,
    )
    optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)
    trained, objective = DistributedDataParallel(model), DistributedDataParallel(loss_func)
    for y in (labels(8), torch.arange(8) + 8 * rank, labels(8)):  # the second batch has no pairs
        optimizer.zero_grad()
        objective(trained(images(8)), y).backward()
        optimizer.step()
    return {"beta": loss_func.loss.beta.detach()}


def test_a_batch_without_pairs_does_not_stop_a_learnable_margin_over_ranks():
    first, second = on_ranks(margin_rank, 2)
    assert first["beta"] == second["beta"] != losses.MarginLoss().beta


def unwrapped_rank(rank):
    """A loss without parameters of its own never asked for DDP; its heads do."""
    model, loss_func = build("pairs", gather_distributed=True)
    trained = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=1e-3)
    torch.manual_seed(10 + rank)
    loss_func(trained(images(8)), labels(8)).backward()  # the heads are still alike
    optimizer.step()
    with pytest.warns(
        S2SDWarning, match="differ between the 2 ranks.*DistributedDataParallel"
    ) as seen:
        loss_func(trained(images(8)), labels(8)).backward()
    assert seen[0].filename == __file__
    return {}


def test_heads_that_are_trained_apart_give_a_warning():
    on_ranks(unwrapped_rank, 2)


def test_a_fingerprint_detects_a_bit_and_no_order_of_summation():
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.complex128]
    parts = [torch.randn(400).mul(30).to(kind) * 10 ** (k % 3) for k, kind in enumerate(kinds)]
    known = distributed.fingerprint(parts)
    order = torch.randperm(400)
    assert known == distributed.fingerprint([p[order] for p in parts])
    for place, p in enumerate(parts):
        others = [q.clone() for q in parts]
        real = torch.view_as_real(others[place]) if p.is_complex() else others[place]
        real.view(distributed.BITS[real.element_size()]).view(-1)[20] ^= 1
        assert distributed.fingerprint(others) != known
    assert distributed.fingerprint(parts[::-1]) != known
    assert distributed.fingerprint([]) == 0


def refuse_rank(rank):
    model, loss_func = build("pairs", gather_distributed=True)
    embeddings, y = model(images(8)), labels(8)
    with pytest.raises(DistributedError, match="Pass the miner to S2SDLoss"):
        loss_func(embeddings, y, miners.BatchHardMiner()(embeddings, y))
    with pytest.raises(DistributedError, match="ref_emb"):
        loss_func(embeddings, y, ref_emb=embeddings, ref_labels=y)
    loss_func.eval()
    assert torch.equal(loss_func(embeddings, y), loss_func.loss(embeddings, y))
    return {}


def disagree_rank(rank):
    """Whatever goes wrong on one rank ends the call on both, with no rank left waiting."""
    model, loss_func = build("multi_similarity", gather_distributed=True)
    embeddings, y = model(images(8)), labels(8)
    mine = rank == 1

    def call(words_here, words_there, *args, **kwargs):
        with pytest.raises(S2SDError, match=words_here if mine else words_there):
            loss_func(*args, **kwargs)

    other = "rank 1 of 2 refused its own"
    call("labels have shape", other, embeddings, y[: 7 if mine else 8])
    call("no autograd graph", other, embeddings.detach() if mine else embeddings, y)
    call("drop_last", other, embeddings[: 0 if mine else 8], y[: 0 if mine else 8])
    call("must be a floating point tensor", other, "nothing" if mine else embeddings, y)
    features = torch.randn(8, F_DIM)
    types = "type of the labels .*: .torch.int64, None., in rank"
    call(types, types, embeddings, None if mine else y, features=features)
    types = "type of the labels .*: .torch.int64, torch.int32., in rank"
    call(types, types, embeddings, y.int() if mine else y)
    types = "type of the embeddings: .torch.float32, torch.float64., in rank"
    call(types, types, embeddings.double() if mine else embeddings, y)
    wide = torch.randn(8, D + rank)
    call(f"embedding size: .{D}, {D + 1}.", "embedding size", wide, y, features=features)
    loss_func.step += rank
    call("training step: .0, 1.", "training step: .0, 1.", embeddings, y)
    loss_func.step -= rank
    loss_func(embeddings, y).backward()
    return {}


def test_what_one_rank_refuses_all_refuse_and_none_hangs():
    on_ranks(disagree_rank, 2)


def failing_head_rank(rank):
    """One row is too few for batch norm: the rank that has two must not wait for it."""
    model = Model()
    loss_func = S2SDLoss(
        losses.ContrastiveLoss(),
        embedder=model.embedder,
        head_dims=(8,),
        head=lambda f, d: torch.nn.Sequential(torch.nn.Linear(f, d), torch.nn.BatchNorm1d(d)),
        gather_distributed=True,
    )
    error, words = (DistributedError, "rank 1 of 2") if rank == 0 else (ValueError, "more than 1")
    with pytest.raises(error, match=words):
        loss_func(model(images(2 - rank)), labels(2 - rank))
    return {}


def test_a_head_that_fails_on_one_rank_stops_the_others():
    on_ranks(failing_head_rank, 2)


def scattered_rank(rank):
    torch.manual_seed(0)
    weights, x = torch.randn(2, 6, 4), torch.randn(3, 4, requires_grad=True)
    with unittest.mock.patch("torch.distributed.get_backend", return_value="nccl"):
        rows = torch.cat(distributed._AllGather.apply(x, 2))
        (rows * weights[rank]).sum().backward()
    expected = weights.sum(dim=0)[3 * rank : 3 * rank + 3]
    torch.testing.assert_close(x.grad, expected)
    return {}


@pytest.mark.skipif(torch.__version__ < "2.13", reason="gloo may scatter no sums before")
def test_the_gradient_by_reduce_scatter_as_nccl_takes_it():
    on_ranks(scattered_rank, 2)


def unlabelled_rank(rank, *, count):
    torch.manual_seed(5)
    model = Model()
    loss_func = S2SDLoss(
        MeanOfProducts(), embedder=model.embedder, head_dims=(8,), gather_distributed=True
    )
    own = slice(rank * 6, rank * 6 + 6) if count > 1 else slice(0, 12)
    value = loss_func(model(images(12))[own])
    return {"value": value.detach()}


def test_a_loss_without_labels_and_a_world_of_one_rank():
    (one,) = on_ranks(functools.partial(unlabelled_rank, count=1), 1)
    for rank in on_ranks(functools.partial(unlabelled_rank, count=2), 2):
        assert rank["value"] == pytest.approx(one["value"], rel=1e-5)


def test_local_indices_and_references_are_refused_over_ranks():
    on_ranks(refuse_rank, 2)


def test_without_a_process_group_it_is_the_local_loss():
    values = []
    for gather in (True, False):
        model, loss_func = build("triplets_mined", gather_distributed=gather)
        torch.manual_seed(2)
        values.append(loss_func(model(images()), labels()))
    assert torch.equal(*values)
