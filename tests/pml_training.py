"""Train a PML loss inside S2SDLoss, with plain PML as the twin of its base branch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pml import CLASSES, SIZE, make_miner
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import S2SDError

BATCH, FEATURES, DIMS, REFS = CLASSES * 6, 10, (12, 20), CLASSES * 4
# PML gives these losses masks over the whole matrix of distances.
BY_ROWS = {"CircleLoss", "GeneralizedLiftedStructureLoss", "MultiSimilarityLoss", "SupConLoss"}
WITHOUT_LABELS = {"ManifoldLoss", "SelfSupervisedLoss", "VICRegLoss"}


def labels(per_class: int = BATCH // CLASSES) -> Tensor:
    return torch.arange(CLASSES).repeat_interleave(per_class)


def hardest(embeddings: Tensor) -> Any:
    """Pairs from outside: triplets of a miner that the loss knows nothing of."""
    return miners.BatchHardMiner()(embeddings.detach().float(), labels())


def arguments(loss: nn.Module, ref_emb: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Labels and ref_emb as a PML user passes them to this loss."""
    if type(loss).__name__ in WITHOUT_LABELS:
        return (), {} if ref_emb is None else {"ref_emb": ref_emb}
    if ref_emb is None:
        return (labels(),), {}
    return (labels(),), {"ref_emb": ref_emb, "ref_labels": labels(REFS // CLASSES)}


def seeded(seed: int, call: Any, *args: Any, **kwargs: Any) -> Any:
    """PML draws from torch's random stream and NumPy's."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    return call(*args, **kwargs)


def plain(loss: nn.Module, miner: nn.Module | None, embeddings: Tensor, args: Any, kwargs: Any):
    """The loop of a PML user: mine, call the loss."""
    if miner is not None and "indices_tuple" not in kwargs:
        references = {k: v for k, v in kwargs.items() if k.startswith("ref")}
        kwargs = {**kwargs, "indices_tuple": miner(embeddings, *args, **references)}
    return loss(embeddings, *args, **kwargs)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, FEATURES, dtype=dtype)
        self.embedder = nn.Linear(FEATURES, SIZE, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return features, self.embedder(features)


def full(x: Any) -> Any:
    """What S2SDLoss hands to a loss: float32, or float64 if it is."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.half) else x


def train(
    loss: nn.Module,
    miner: nn.Module | None = None,
    *,
    steps: int = 2,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    given: bool = False,
    ref: str = "none",
    lr: float = 0.01,
    shift_invariant: bool = False,
) -> S2SDLoss:
    """Some steps of S2SD: forward, backward, optimizer.

    In each, ``components["base"]`` is plain PML's value, bit for bit. In the end every parameter of
    heads, losses, embedder and trunk has moved and all is finite.

    Args:
        given: with an indices_tuple from outside.
        ref: "none", or with ref_emb, its features "explicit" or "captured".
    """
    model = Model(dtype)
    if ref == "none" and type(loss).__name__ in ("SelfSupervisedLoss", "VICRegLoss"):
        ref = "captured"
    embedder = None if ref == "explicit" else model.embedder
    loss_func = S2SDLoss(
        loss,
        miner,
        embedder=embedder,
        feature_dim=FEATURES,
        head_dims=DIMS,
        feature_distill_delay=1,
        distill_weight=1.0,
        feature_distill_weight=1.0,
    ).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss_func.add_to(optimizer)
    watched = {**dict(loss_func.named_parameters()), **dict(model.named_parameters())}
    before = {name: p.detach().clone() for name, p in watched.items()}
    for step in range(steps):
        torch.manual_seed(100 + step)
        x = torch.randn(BATCH, 5, dtype=dtype)
        views = (x + 0.5 * torch.randn_like(x))[:REFS] if ref != "none" else None
        if views is not None and type(loss).__name__ in WITHOUT_LABELS:
            views = x + 0.5 * torch.randn_like(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            features, embeddings = model(x)
            ref_features, ref_emb = model(views) if views is not None else (None, None)
            args, kwargs = arguments(loss, ref_emb)
            if given:
                kwargs["indices_tuple"] = hardest(embeddings)
            own = {k: full(v).detach() if k == "ref_emb" else v for k, v in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                twin, twin_miner = copy.deepcopy((loss_func.loss, loss_func.miner))
                expected = seeded(step, plain, twin, twin_miner, full(embeddings), args, own)
            handed = (
                {"features": features, "ref_features": ref_features} if embedder is None else {}
            )
            value = seeded(step, loss_func, embeddings, *args, **kwargs, **handed)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        expected = torch.as_tensor(expected).reshape(())
        if loss_func._stacks:  # another order of summation
            torch.testing.assert_close(loss_func.components["base"], expected)
        else:
            assert torch.equal(loss_func.components["base"], expected)
        assert torch.isfinite(value)
        assert all(torch.isfinite(c) for c in loss_func.components.values())
        assert stats(loss_func.loss) == stats(twin)
    assert (loss_func.components["feature_distill"] > 0) == (steps > 1)
    assert all(torch.isfinite(p).all() for p in watched.values())
    assert {p.dtype for p in watched.values()} == {dtype}
    still = {name for name, p in watched.items() if torch.equal(p, before[name])}
    if shift_invariant or type(loss).__name__ == "VICRegLoss":  # a shift of all changes nothing
        still = {name for name in still if not name.endswith("output.bias")}
    assert not still, still
    assert all(watched[name] is p for name, p in loss_func.named_parameters())
    return loss_func


def in_self_supervised(name: str, symmetric: bool) -> None:
    loss = losses.SelfSupervisedLoss(getattr(losses, name)(), symmetric=symmetric)
    train(loss, ref="explicit" if symmetric else "captured")


def in_cross_batch_memory(name: str, mined: str) -> None:
    """With the miner of the memory "inside" it, pairs from "outside", or "no" pairs."""
    inner = getattr(losses, name)()
    miner = make_miner("MultiSimilarityMiner") if mined == "inside" else None
    loss = losses.CrossBatchMemory(inner, SIZE, memory_size=BATCH + 20, miner=miner)
    loss_func = train(
        loss, given=mined == "outside", steps=1 if mined == "outside" and name in BY_ROWS else 3
    )
    memories = [loss_func.loss, *(b.loss for b in loss_func.branches.values())]
    assert [m.embedding_memory.shape[1] for m in memories] == [SIZE, *DIMS]
    assert len({m.queue_idx for m in memories}) == 1


def refused(loss: nn.Module, miner: nn.Module | None, error: type[Exception], words: str, **kwargs):
    """Plain PML fails with the error and the words; S2SDLoss refuses, and says them too."""
    torch.manual_seed(0)
    embeddings = torch.randn(BATCH, SIZE, requires_grad=True)
    args = kwargs.pop("args", (labels(),))
    with pytest.raises(error, match=words):
        plain(copy.deepcopy(loss), copy.deepcopy(miner), embeddings, args, kwargs)
    loss_func = S2SDLoss(loss, miner, feature_dim=FEATURES, head_dims=DIMS)
    kwargs["features"] = torch.randn(BATCH, FEATURES)
    if "ref_emb" in kwargs:
        kwargs["ref_features"] = torch.randn(len(kwargs["ref_emb"]), FEATURES)
    with pytest.raises(S2SDError, match=words) as caught:
        loss_func(embeddings, *args, **kwargs)
    assert type(loss).__name__ in str(caught.value)


def stats(module: nn.Module) -> list[tuple[str, Any]]:
    """What PML recorded in the module and the modules inside it."""
    names = [
        (name, stat)
        for name, m in module.named_modules()
        for stat in getattr(m, "_record_these_stats", [])
    ]
    return [(f"{n}.{stat}", getattr(module.get_submodule(n), stat)) for n, stat in names]
