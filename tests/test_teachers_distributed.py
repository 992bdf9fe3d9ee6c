"""Outside teachers and Matryoshka prefixes on two gloo ranks equal one process."""

import functools

import pytest
import torch
from helpers import F_DIM, B, D, Model, images, labels
from processes import on_ranks
from pytorch_metric_learning import losses
from torch.nn.parallel import DistributedDataParallel

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import BatchError, DistributedError

PLANS = {
    "even": ({"weight": 5.0}, (12, 12)),
    "uneven, chunks": ({"weight": {"t": 5.0, "u": 1.0}, "chunk_size": 3}, (16, 8)),
    "prefixes": ({"weight": 5.0, "matryoshka_dims": (2, 4), "exclude_self": True}, (12, 12)),
    "prefixes, chunks": ({"weight": 5.0, "matryoshka_dims": (2,), "chunk_size": 5}, (8, 16)),
    "no heads": ({"weight": 5.0, "head_dims": (), "feature_distill_weight": 0}, (12, 12)),
}


def two_steps(settings, parts, rank, wrap, gather):
    torch.manual_seed(1)
    model = Model()
    kwargs = {"head_dims": (8, 10), "feature_distill_delay": 1, "distill_weight": 5.0, **settings}
    loss_func = S2SDLoss(
        losses.ProxyAnchorLoss(6, D),
        embedder=model.embedder,
        teacher_weight=kwargs.pop("weight"),
        gather_distributed=gather,
        **kwargs,
    )
    optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)
    trained, objective = wrap(model), wrap(loss_func)
    start, rows = sum(parts[:rank]), sum(parts)
    own = slice(start, start + parts[rank])
    for _ in range(2):
        x = images(rows)
        teachers = {"t": torch.randn(rows, 7), "u": torch.randn(rows, 3).half()}
        optimizer.zero_grad()
        of_rank = {name: t[own] for name, t in teachers.items()}
        value = objective(trained(x[own]), labels(rows)[own], teachers=of_rank)
        value.backward()
        optimizer.step()
    record = {"value": value.detach(), **loss_func.components}
    named = [*model.named_parameters(), *loss_func.named_parameters()]
    return record | {f"grad {n}": p.grad for n, p in named}


def train_rank(rank):
    record = {}
    for plan, (settings_, parts) in PLANS.items():
        found = two_steps(settings_, parts, rank, DistributedDataParallel, True)
        record |= {f"{plan}/{key}": value for key, value in found.items()}
    return record


def test_two_ranks_equal_one_process_with_the_whole_batch():
    ranks = on_ranks(train_rank, 2)
    for plan, (settings_, parts) in PLANS.items():
        want = two_steps(settings_, [sum(parts)], 0, lambda module: module, False)
        for rank in ranks:
            for key, value in want.items():
                found = torch.from_numpy(rank[f"{plan}/{key}"])
                where = functools.partial("{} {}: {}".format, plan, key)
                torch.testing.assert_close(found, value, rtol=1e-4, atol=2e-6, msg=where)


def disagree_rank(rank):
    loss_func = S2SDLoss(
        losses.NTXentLoss(),
        feature_dim=F_DIM,
        head_dims=(5,),
        teacher_weight=3.0,
        gather_distributed=True,
    )
    ψ, φ = torch.randn(B, D, requires_grad=True), torch.randn(B, F_DIM)
    mine = rank == 1

    def call(here, there, teachers):
        with pytest.raises(DistributedError if not mine else (BatchError, DistributedError)) as e:
            loss_func(ψ, labels(), features=φ, teachers=teachers)
        assert (here if mine else there) in str(e.value)

    call("has 23 rows", "rank 1 of 2 refused", {"t": torch.randn(B - mine, 7)})
    call("no teachers", "rank 1 of 2 refused", None if mine else {"t": torch.randn(B, 7)})
    names = "names or widths of the outside teachers"
    call(names, names, {"u" if mine else "t": torch.randn(B, 7)})
    call(names, names, {"v" if mine else "t": torch.randn(B, 3 if mine else 7)})
    return {}


def test_what_one_rank_refuses_all_refuse():
    on_ranks(disagree_rank, 2)
