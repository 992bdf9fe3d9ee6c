"""Mistakes and edge cases: each works as documented, or is refused with a suggested fix."""

import gc
import threading
import weakref

import pytest
import torch
from helpers import F_DIM, B, D, Model, images, labels, plain_s2sd
from pytorch_metric_learning import losses, miners
from torch import nn

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import ArgumentError, BatchError, MissingFeaturesError, S2SDError


def make(loss=None, miner=None, **kwargs):
    model = Model()
    settings = {
        "embedder": model.embedder,
        "head_dims": (8, 16),
        "feature_distill_delay": 0,
        **kwargs,
    }
    return model, S2SDLoss(loss or losses.MultiSimilarityLoss(), miner, **settings)


def with_features(**kwargs):
    return make(embedder=None, feature_dim=F_DIM, **kwargs)[1]


def parameters_of(*modules):
    return [p for m in modules for p in m.parameters()]


MINERS = [None, miners.MultiSimilarityMiner()]


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["images", "features", "embeddings"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("miner", MINERS, ids=["plain", "mined"])
def test_what_is_not_finite_is_never_hidden(where, bad, miner):
    """GradScaler and anomaly checks see it; no number is made up."""
    model, loss_func = make(miner=miner)
    x, φ = images(), torch.randn(B, F_DIM)
    if where == "images":
        x[3] = bad
        loss = loss_func(model(x), labels())
    else:
        ψ = torch.randn(B, D, requires_grad=True)
        (φ if where == "features" else ψ.data)[3] = bad
        loss = loss_func(ψ, labels(), features=φ)
    assert loss.isnan()
    assert loss_func.components["distill"].isnan() or where == "features"


DEGENERATE = {
    "all the same class": (images, lambda: torch.zeros(B, dtype=torch.long)),
    "all classes distinct": (images, lambda: torch.arange(B)),
    "one sample": (lambda: images(1), lambda: labels(1)),
    "two samples": (lambda: images(2), lambda: labels(2)),
    "equal samples": (lambda: images(1).expand(B, -1, -1, -1), labels),
    "zero images": (lambda: torch.zeros(B, 3, 4, 4), labels),
    "negative labels": (images, lambda: labels() - 3),
}


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("miner", MINERS, ids=["plain", "mined"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_are_the_equations_too(case, miner, exclude_self):
    model, loss_func = make(miner=miner, exclude_self=exclude_self)
    make_images, make_labels = DEGENERATE[case]
    x, y = make_images(), make_labels()
    if len(x) == 1:  # no relations: no distillation
        expected = loss_func(model(x), y) * 0
    else:
        expected = plain_s2sd(loss_func, model(x), model.trunk(x), y, step=0)
    found = loss_func(model(x), y)
    torch.testing.assert_close(found, expected.reshape(()), rtol=1e-4, atol=1e-5)
    found.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_zero_features_and_zero_embeddings_give_finite_numbers():
    loss_func = with_features()
    ψ = torch.zeros(B, D, requires_grad=True)
    loss = loss_func(ψ, labels(), features=torch.zeros(B, F_DIM))
    loss.backward()
    assert loss.isfinite()
    assert ψ.grad.isfinite().all()


NUMBERS = [torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize(
    ("loss", "miner"),
    [
        (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
        (losses.TripletMarginLoss(), None),
        (losses.ProxyAnchorLoss(6, D), None),
        (losses.ArcFaceLoss(6, D), None),
        (losses.SupConLoss(), None),
    ],
    ids=lambda part: type(part).__name__,
)
def test_labels_of_any_kind_of_number(loss, miner, dtype):
    """The value of int64 labels; what the loss itself refuses is refused with its reason."""
    model, loss_func = make(loss, miner)
    ψ = model(images())
    expected = loss_func(ψ, labels())
    try:
        loss(torch.randn(B, D), labels().to(dtype))
        refuses = False
    except (IndexError, RuntimeError):
        refuses = True
    if refuses:
        with pytest.raises(S2SDError, match=rf"{type(loss).__name__}.*{dtype}.*labels\.long\(\)"):
            loss_func(ψ, labels().to(dtype))
    else:
        torch.testing.assert_close(loss_func(ψ, labels().to(dtype)), expected)


# --- tensors ----------------------------------------------------------------------------------


def inference(*shape):
    with torch.inference_mode():
        return torch.randn(*shape)


X, PHI = torch.randn(B, D), torch.randn(B, F_DIM)
REFUSED = {
    "tuple": (((X, PHI), labels()), BatchError, "tuple"),
    "dict": (({"embeddings": X}, labels()), BatchError, "dict"),
    "none": ((None, labels()), BatchError, "NoneType"),
    "numpy": ((X.numpy(), labels()), BatchError, "ndarray"),
    "complex": ((X.to(torch.complex64), labels()), BatchError, "complex64"),
    "sparse": ((X.to_sparse(), labels()), BatchError, "sparse.*dense first"),
    "nested": ((torch.nested.nested_tensor([X[:2], X[2:]]), labels()), BatchError, "nested"),
    "scalar": ((X.sum(), labels()), BatchError, r"\(batch, embedding size\)"),
    "zero width": ((X[:, :0], labels()), BatchError, r"\(24, 0\)"),
    "meta": ((X.to("meta"), labels()), BatchError, "embeddings are on the meta device"),
    "meta labels": ((X, labels().to("meta")), BatchError, "labels are on the meta device"),
    "a miner as pairs": (
        (X, labels(), miners.BatchHardMiner()),
        BatchError,
        "BatchHardMiner.*miner",
    ),
    "features as pairs": ((X, labels(), PHI), BatchError, "indices_tuple is a Tensor.*features="),
    "nan labels": ((X, labels() * float("nan")), BatchError, "24 of the 24 labels are NaN"),
}
REFUSED_FEATURES = {
    "list": (PHI.tolist(), BatchError, "list"),
    "numpy": (PHI.numpy(), BatchError, "ndarray"),
    "sparse": (PHI.to_sparse(), BatchError, "features must be a dense tensor"),
    "complex": (PHI.to(torch.complex64), BatchError, "complex64"),
    "of inference mode": (inference(B, F_DIM), MissingFeaturesError, r"features.clone\(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_batch(case):
    args, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        with_features()(*args, features=PHI)


def test_embeddings_of_another_size_than_the_losss():
    loss_func = with_features(loss=losses.ArcFaceLoss(6, D + 1))
    with pytest.raises(BatchError, match=f"ArcFaceLoss.*is made for embeddings of size {D + 1}"):
        loss_func(X, labels(), features=PHI)


@pytest.mark.parametrize("case", REFUSED_FEATURES)
def test_what_is_no_features(case):
    features, error, words = REFUSED_FEATURES[case]
    with pytest.raises(error, match=words):
        with_features()(X, labels(), features=features)


@pytest.mark.parametrize("case", ["transposed", "expanded", "strided", "without gradient"])
def test_memory_layout_changes_nothing(case):
    loss_func = with_features()
    odd = {
        "transposed": (torch.randn(D, B).T, torch.randn(F_DIM, B).T),
        "expanded": (torch.randn(1, D).expand(B, D), torch.randn(1, F_DIM).expand(B, F_DIM)),
        "strided": (torch.randn(2 * B, 2 * D)[::2, ::2], torch.randn(2 * B, F_DIM)[::2]),
        "without gradient": (torch.randn(B, D), torch.randn(B, F_DIM)),
    }[case]
    values, grads = [], []
    for ψ, φ in (odd, [x.clone().contiguous() for x in odd]):
        ψ = ψ.detach().requires_grad_(case != "without gradient")
        loss_func.zero_grad()
        values.append(loss_func(ψ, labels(), features=φ))
        values[-1].backward()
        grads.append(torch.cat([p.grad.flatten() for p in loss_func.parameters()]))
        if ψ.requires_grad:
            grads[-1] = torch.cat([grads[-1], ψ.grad.flatten()])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("embeddings", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "features", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_precisions_of_embeddings_and_features_may_differ(embeddings, features):
    loss_func = with_features()
    ψ, φ = X.detach().clone().to(embeddings).requires_grad_(), PHI.to(features)
    loss = loss_func(ψ, labels(), features=φ)
    loss.backward()
    expected = loss_func(ψ.float(), labels(), features=φ.float())
    assert loss.dtype == (torch.float64 if embeddings == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.float(), expected, rtol=1e-3, atol=1e-3)
    assert ψ.grad.dtype == embeddings


# --- models -----------------------------------------------------------------------------------


def test_a_frozen_trunk_with_the_embedder_named_trains_the_rest():
    model, loss_func = make()
    model.trunk.requires_grad_(False)
    loss_func(model(images()), labels()).backward()
    assert model.trunk.weight.grad is None
    assert all(p.grad.abs().sum() > 0 for p in parameters_of(model.embedder, loss_func))


def test_a_frozen_trunk_named_as_the_trunk_is_refused():
    model = Model()
    loss_func = S2SDLoss(losses.NTXentLoss(), trunk=model.trunk, feature_dim=F_DIM, head_dims=(8,))
    model.trunk.requires_grad_(False)
    with pytest.raises(MissingFeaturesError, match="name the embedder instead"):
        loss_func(model(images()), labels())


def test_a_frozen_model_is_refused_and_features_given_train_the_heads():
    model, loss_func = make()
    model.requires_grad_(False)
    x = images()
    with pytest.raises(MissingFeaturesError, match="frozen model.*features="):
        loss_func(model(x), labels())
    loss_func(model(x), labels(), features=model.trunk(x)).backward()
    assert all(p.grad is not None for p in loss_func.parameters())


def test_an_exception_between_the_forward_and_the_loss_leaves_nothing_behind():
    model, loss_func = make()

    def failing_step():
        features = model.trunk(images()).mean(dim=(2, 3))
        kept.append(weakref.ref(features))
        model.embedder(features)
        raise KeyError("a fault in the user's loop")

    kept = []
    with pytest.raises(KeyError):
        failing_step()
    with pytest.raises(RuntimeError):  # inside the embedder itself
        model.embedder(torch.randn(3, F_DIM + 1))
    gc.collect()
    assert kept[0]() is None
    x = images()
    found = loss_func(model(x), labels())
    torch.testing.assert_close(
        found, plain_s2sd(loss_func, model(x), model.trunk(x), labels(), step=0)
    )


def test_a_loss_refuses_another_models_embeddings_and_takes_them_with_features():
    model, loss_func = make()
    other, x = Model(), images()
    with pytest.raises(MissingFeaturesError, match="another model"):
        loss_func(other(x), labels())
    with pytest.raises(MissingFeaturesError, match="1 of the 2 parts"):
        loss_func(torch.cat([model(x[:12]), other(x[12:])]), labels())
    φ = other.trunk(x)
    loss_func(other(x), labels(), features=φ).backward()
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_an_embedder_replaced_after_the_loss_was_built_is_refused():
    model, loss_func = make()
    model.embedder = nn.Linear(F_DIM, D)
    with pytest.raises(MissingFeaturesError, match="replaced by another.*FeatureCapture"):
        loss_func(model(images()), labels())


def test_hooks_cleared_by_other_code_are_noticed():
    model, loss_func = make()
    model.embedder._forward_hooks.clear()
    with pytest.raises(MissingFeaturesError, match="No captured forward of the embedder Linear"):
        loss_func(model(images()), labels())


@pytest.mark.parametrize("when", ["before", "after"])
def test_weight_norm_put_on_the_embedder(when):
    model = Model()
    if when == "before":
        nn.utils.parametrizations.weight_norm(model.embedder)
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=model.embedder, head_dims=(8,))
    if when == "after":
        nn.utils.parametrizations.weight_norm(model.embedder)
    loss_func(model(images()), labels()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.embedder.parametrizations.parameters())


def test_a_lazy_embedder_with_the_feature_dimension_given():
    model = Model()
    model.embedder = nn.LazyLinear(D)
    loss_func = S2SDLoss(
        losses.NTXentLoss(), embedder=model.embedder, feature_dim=F_DIM, head_dims=(8,)
    )
    loss_func(model(images()), labels()).backward()
    assert model.embedder.weight.grad.abs().sum() > 0


def test_functional_call_finds_the_features_too():
    model, loss_func = make()
    swapped = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss_func(torch.func.functional_call(model, swapped, images()), labels()).backward()
    assert all(p.grad is not None for p in swapped.values())
    assert all(p.grad is None for p in model.parameters())


# --- the loop ---------------------------------------------------------------------------------


def test_two_losses_of_one_batch_and_a_retained_graph():
    model, loss_func = make(miner=miners.MultiSimilarityMiner())
    ψ = model(images())
    first, second = loss_func(ψ, labels()), loss_func(ψ, labels())
    torch.testing.assert_close(first, second)
    first.backward(retain_graph=True)
    once = [p.grad.clone() for p in parameters_of(model, loss_func)]
    second.backward(retain_graph=True)
    first.backward()
    for grad, p in zip(once, parameters_of(model, loss_func), strict=True):
        torch.testing.assert_close(p.grad, 3 * grad)
    assert int(loss_func.step) == 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["add_to", "parameters"])
def test_an_optimizer_built_before_or_after_a_change_of_precision(when, how, recwarn):
    model, loss_func = make()

    def optimizer():
        if how == "add_to":
            built = torch.optim.SGD(model.parameters(), lr=0.1)
            loss_func.add_to(built)
            return built
        return torch.optim.SGD(parameters_of(model, loss_func), lr=0.1)

    early = optimizer() if when == "before" else None
    model.double()
    loss_func.double()
    used = early or optimizer()
    start = [p.clone() for p in parameters_of(model, loss_func)]
    for _ in range(7):
        used.zero_grad()
        loss_func(model(images(dtype=torch.float64)), labels()).backward()
        used.step()
    moved = zip(start, parameters_of(model, loss_func), strict=True)
    assert all((a != b).any() for a, b in moved)
    assert not [w for w in recwarn if "auxiliary heads" in str(w.message)]


HOT = {
    "distill_weight": [-1, float("nan"), "50", None],
    "feature_distill_weight": [-1, float("inf")],
    "temperature": [0, -0.1, float("nan"), None],
    "feature_distill_delay": [-1, 1.5, None],
    "chunk_size": [0, -3, 2.5],
    "pooling": ["max", None],
    "exclude_self": ["no", None],
    "gather_distributed": [1, "yes"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in HOT.items() for v in values])
def test_a_bad_setting_assigned_later_is_refused_at_the_next_step(name, value):
    model, loss_func = make()
    x = images()
    before = loss_func(model(x), labels())
    good = getattr(loss_func, name)
    setattr(loss_func, name, value)
    with pytest.raises(ArgumentError, match=name):
        loss_func(model(x), labels())
    assert int(loss_func.step) == 1
    setattr(loss_func, name, good)
    torch.testing.assert_close(loss_func(model(x), labels()), before)


def test_training_in_several_threads_is_as_in_one():
    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        model, loss_func = pairs[seed]
        optimizer = torch.optim.SGD(parameters_of(model, loss_func), lr=0.01)
        for _ in range(5):
            x = torch.randn(B, 3, 4, 4, generator=generator)
            loss = loss_func(model(x), labels())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results[seed] = loss.item()

    outcomes = []
    for run in (lambda ts: [t.run() for t in ts], lambda ts: [t.start() for t in ts]):
        torch.manual_seed(0)
        pairs, results = [make(miner=miners.MultiSimilarityMiner()) for _ in range(4)], {}
        threads = [threading.Thread(target=train, args=[seed]) for seed in range(4)]
        run(threads)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        outcomes.append([results[seed] for seed in range(4)])
    assert outcomes[0] == outcomes[1]


def test_forwards_of_one_model_in_several_threads_keep_their_features_apart():
    model, loss_func = make()
    barrier, found = threading.Barrier(4), {}

    def forward(seed):
        barrier.wait()
        for i in range(20):
            x = torch.randn(B, 3, 4, 4, generator=torch.Generator().manual_seed(100 * seed + i))
            φ = model.trunk(x).mean(dim=(2, 3))
            found[seed, i] = torch.equal(loss_func.capture.features_of(model.embedder(φ)), φ)

    threads = [threading.Thread(target=forward, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(found.values())
