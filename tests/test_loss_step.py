"""What a training step costs: reads that wait for the device, operations, one compiled graph."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from helpers import F_DIM, D, Model, images, plain_s2sd
from pytorch_metric_learning import distances, losses, miners
from torch.utils._python_dispatch import TorchDispatchMode

from s2sd_pml import S2SDLoss
from s2sd_pml.similarity import cosines

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from launches import launches

DIMS, B = (5, 7, 9, 11), 12
Y = torch.arange(B) // 3


def ms():
    return losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()


# --- reads ----------------------------------------------------------------------------------------

READS = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "equal"}
READS |= {"unique", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


class Reads(TorchDispatchMode):
    """Operations for whose result, or its size, a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], (list, tuple)) else [])
        )
        if name in READS or by_mask:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def reads(work):
    with Reads() as mode:
        work()
    return mode.names


def test_reads_are_seen():
    x = torch.randn(4, requires_grad=True)
    assert reads(lambda: x.sum().item()) == ["_local_scalar_dense"]
    assert reads(lambda: bool(x.sum() > 0)) == ["_local_scalar_dense"]
    assert reads(lambda: torch.where(x > 0)) == ["nonzero"]
    assert len(reads(lambda: x[x > 0].sum().backward())) > 0
    assert not reads(lambda: x.exp().sum().backward())


@pytest.mark.parametrize("how", ["given", "captured", "chunks"])
@pytest.mark.parametrize(
    "parts",
    [
        ms,
        lambda: (losses.MultiSimilarityLoss(), None),
        lambda: (
            losses.MultiSimilarityLoss(distance=distances.LpDistance(power=2)),
            miners.MultiSimilarityMiner(distance=distances.LpDistance()),
        ),
        lambda: (losses.GeneralizedLiftedStructureLoss(), None),
    ],
    ids=["mined", "multi-similarity", "of distances", "lifted"],
)
def test_a_step_reads_nothing_back(parts, how):
    model = Model()
    kwargs = {"feature_dim": F_DIM} if how == "given" else {"embedder": model.embedder}
    kwargs |= {"chunk_size": 5} if how == "chunks" else {}
    loss_func = S2SDLoss(*parts(), head_dims=DIMS, feature_distill_delay=2, **kwargs)
    loss_func.add_to(torch.optim.SGD(model.parameters(), lr=0.1))
    x = images(B)

    def step():
        features = model.trunk(x).mean(dim=(2, 3))
        given = {"features": features} if how == "given" else {}
        loss_func(model.embedder(features), Y, **given).backward()

    for _ in range(4):
        assert reads(step) == []
    assert loss_func.components["feature_distill"] > 0


@pytest.mark.skipif(torch.__version__ < "2.4", reason="its dispatch modes know no ``byte ^ 1``")
@pytest.mark.parametrize(
    "kind",
    [
        losses.CircleLoss,
        losses.SupConLoss,
        losses.ContrastiveLoss,
        losses.NTXentLoss,
        losses.TupletMarginLoss,
        losses.LiftedStructureLoss,
        losses.TripletMarginLoss,
        losses.SignalToNoiseRatioContrastiveLoss,
    ],
)
def test_all_spaces_read_no_more_than_one(kind):
    loss_func = S2SDLoss(kind(), feature_dim=F_DIM, head_dims=DIMS, feature_distill_delay=0)
    embeddings, features = torch.randn(B, D, requires_grad=True), torch.randn(B, F_DIM)
    own = reads(lambda: loss_func.loss(embeddings, Y).backward())
    found = reads(lambda: loss_func(embeddings, Y, features=features).backward())
    listed = kind is losses.NTXentLoss  # vmap makes a list of the mask in PML's x[mask] = number
    assert len(found) <= len(own) + listed


# --- operations -----------------------------------------------------------------------------------

BOUNDS = {
    "MultiSimilarity, mined": (ms, 2.4),
    "MultiSimilarity": (lambda: (losses.MultiSimilarityLoss(), None), 3.5),
    "Circle": (lambda: (losses.CircleLoss(), None), 2.8),
    "NTXent": (lambda: (losses.NTXentLoss(), None), 3.2),
    "SupCon": (lambda: (losses.SupConLoss(), None), 3.2),
    "Contrastive": (lambda: (losses.ContrastiveLoss(), None), 4.5),
}


@pytest.mark.parametrize("case", BOUNDS.values(), ids=BOUNDS)
def test_operations_over_those_of_the_base_loss(case):
    """The paper's number of heads; what is counted depends on no size."""
    parts, bound = case
    (loss, miner), embedder = parts(), torch.nn.Linear(F_DIM, D)
    features = torch.randn(B, F_DIM, requires_grad=True)
    loss_func = S2SDLoss(loss, miner, feature_dim=F_DIM, head_dims=DIMS, feature_distill_delay=0)

    def base():
        embeddings = embedder(features)
        loss(embeddings, Y, None if miner is None else miner(embeddings, Y)).backward()

    def step():
        loss_func(embedder(features), Y, features=features).backward()

    alone = launches(base, "cpu")
    assert launches(step, "cpu") < bound * alone


@pytest.mark.parametrize(("chunk_size", "matrices"), [(None, len(DIMS) + 2), (5, 0)])
def test_similarities_are_computed_once_or_in_chunks(chunk_size, matrices, monkeypatch):
    shapes = []

    def counted(x):
        shapes.append(x.shape)
        return cosines(x)

    kwargs = {"feature_dim": F_DIM, "head_dims": DIMS, "feature_distill_delay": 0}
    loss = losses.MultiSimilarityLoss(distance=distances.LpDistance())
    loss_func = S2SDLoss(loss, chunk_size=chunk_size, **kwargs)
    for module in ("similarity", "stacking"):
        monkeypatch.setattr(f"s2sd_pml.{module}.cosines", counted)
    loss_func(torch.randn(B, D), Y, features=torch.randn(B, F_DIM))
    assert len(shapes) == matrices


# --- compiled -------------------------------------------------------------------------------------

compiles = pytest.mark.skipif(torch.__version__ < "2.4", reason="fullgraph works from there on")


def trained(loss_func, call, steps):
    """Values, components and gradients of training steps, each on its own batch."""
    found = []
    for k in range(steps):
        torch.manual_seed(k)
        embeddings = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
        features = torch.randn(B, F_DIM, dtype=torch.float64, requires_grad=True)
        loss_func.zero_grad()
        value = call(embeddings, Y, features=features)
        value.backward()
        grads = [x.grad for x in (embeddings, features, *loss_func.parameters())]
        found.append([value.detach(), *loss_func.components.values(), *grads])
        assert loss_func.step == k + 1
    return found


def compiled_and_eager(backend, parts, **kwargs):
    kwargs = {"feature_dim": F_DIM, "head_dims": (5, 7), "feature_distill_delay": 3, **kwargs}
    torch._dynamo.reset()
    torch.manual_seed(0)
    first = S2SDLoss(*parts, **kwargs).double()
    torch.manual_seed(0)
    second = S2SDLoss(*parts, **kwargs).double()
    found = trained(first, torch.compile(first, fullgraph=True, backend=backend), 6)
    torch.testing.assert_close(found, trained(second, second, 6), rtol=1e-9, atol=1e-10)
    begun = [step[4] > 0 for step in found]
    assert begun == [False] * 3 + [True] * 3
    return first, second


@compiles
@pytest.mark.parametrize(
    ("mined", "kwargs"),
    [
        (True, {"exclude_self": True, "temperature": 0.5}),
        pytest.param(True, {}, marks=pytest.mark.slow),
        pytest.param(False, {}, marks=pytest.mark.slow),
    ],
)
def test_compiled_in_one_graph_it_is_the_same(mined, kwargs):
    loss, miner = ms()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    first, second = compiled_and_eager(counter, (loss, miner if mined else None), **kwargs)
    assert counter.frame_count == 1
    assert first.state_dict()["counter._extra_state"] == 6
    x, φ = torch.randn(B, D).double(), torch.randn(B, F_DIM).double()
    want = plain_s2sd(first, x, φ, Y, 6)
    torch.testing.assert_close(first(x.requires_grad_(), Y, features=φ), want)
    assert first.step == 7  # eager steps go on counting
    second.load_state_dict(first.state_dict())
    assert second.step == 7


@pytest.mark.parametrize("kwargs", [{}, {"feature_distill_weight": 0}, {"head_dims": ()}])
def test_what_is_compiled_is_the_same_as_it_stands(kwargs, monkeypatch):
    """The way of a compiled forward, run eagerly: the step is a tensor there."""
    kwargs = {"feature_dim": F_DIM, "head_dims": (5, 7), "feature_distill_delay": 2, **kwargs}
    first = S2SDLoss(*ms(), **kwargs).double()
    second = copy.deepcopy(first)
    want = trained(first, first, 4)
    for module in ("loss", "spaces", "teachers", "counter", "validation"):
        monkeypatch.setattr(f"s2sd_pml.{module}.is_compiling", lambda: True)
    torch.testing.assert_close(trained(second, second, 4), want, rtol=1e-12, atol=1e-12)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("mined", [True, False])
def test_compiled_with_inductor_it_is_the_same(mined):
    loss, miner = ms()
    compiled_and_eager("inductor", (loss, miner if mined else None))
