"""S2SD inside the loops people have: accumulation, checkpointing, GradCache, EMA, AMP, compile."""

import copy

import numpy as np
import pytest
import torch
from helpers import CPU_FLOAT16, F_DIM, Model, images, labels
from pytorch_metric_learning import losses, miners
from torch.utils.checkpoint import checkpoint

from s2sd_pml import FeatureCapture, S2SDLoss
from s2sd_pml.errors import MissingFeaturesError


def make(**kwargs):
    torch.manual_seed(1)
    model = Model()
    kwargs = {"head_dims": (8, 9), "feature_distill_delay": 0, "embedder": model.embedder, **kwargs}
    loss_func = S2SDLoss(losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(), **kwargs)
    return model, loss_func


def grads(model, loss_func):
    return [p.grad for m in (model, loss_func) for p in m.parameters()]


def assert_same_gradients(a, b, **tolerance):
    for x, y in zip(grads(*a), grads(*b), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_activation_checkpointing():
    plain, checkpointed, x = make(), make(), images()
    plain[1](plain[0](x), labels()).backward()
    model, loss_func = checkpointed
    feature_map = checkpoint(model.trunk, x, use_reentrant=False)
    loss_func(model.embedder(feature_map.mean(dim=(2, 3))), labels()).backward()
    assert_same_gradients(plain, checkpointed)


def test_gradcache_with_explicit_features():
    plain, cached, x = make(), make(), images()
    plain[1](plain[0](x), labels()).backward()
    model, loss_func = cached

    def features_of(part):
        return model.trunk(part).mean(dim=(2, 3))

    with torch.no_grad():  # first pass: representations only
        features = torch.cat([features_of(part) for part in x.split(6)])
        embeddings = model.embedder(features)
    features.requires_grad_()
    embeddings.requires_grad_()
    loss_func(embeddings, labels(), features=features).backward()
    for part, df, de in zip(
        x.split(6), features.grad.split(6), embeddings.grad.split(6), strict=True
    ):
        f = features_of(part)  # second pass: replay each part with its gradient
        torch.autograd.backward([f, model.embedder(f)], [df, de])
    assert_same_gradients(plain, cached)


def test_gradient_accumulation_is_the_sum_of_the_parts():
    whole, parts, x = make(), make(), images()
    sum(whole[1](whole[0](part), labels(12)) for part in x.split(12)).backward()
    for part in x.split(12):
        parts[1](parts[0](part), labels(12)).backward()
    assert_same_gradients(whole, parts)
    assert parts[1].step == 2


def test_an_ema_copy_evaluates_with_the_training_model():
    (model, loss_func), x = make(), images()
    ema = torch.optim.swa_utils.AveragedModel(model)
    embeddings = model(x)
    features = loss_func.capture.features_of(embeddings)
    ema.update_parameters(model)
    ema(images())
    assert loss_func.capture.features_of(embeddings) is features
    loss_func(embeddings, labels()).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, CPU_FLOAT16])
def test_autocast_with_a_grad_scaler(dtype):
    model, loss_func = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_func.add_to(optimizer)
    before = copy.deepcopy([model, loss_func])
    if hasattr(torch.amp, "GradScaler"):
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    else:  # before torch 2.3 there was none for the CPU
        scaler = torch.cuda.amp.GradScaler(enabled=False)
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_func(model(images()), labels())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert loss.dtype == torch.float32
    moved = zip(before[1].parameters(), loss_func.parameters(), strict=True)
    assert all(not torch.equal(p, q) for p, q in moved)


def test_resume_is_bit_identical():
    def loop(model, loss_func, optimizer, start, stop):
        for step in range(start, stop):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss_func(model(images()), labels()).backward()
            optimizer.step()

    def fresh():
        model, loss_func = make(feature_distill_delay=3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        loss_func.add_to(optimizer)
        return model, loss_func, optimizer

    straight = fresh()
    loop(*straight, 0, 6)
    first = fresh()
    loop(*first, 0, 2)
    states = [copy.deepcopy(part.state_dict()) for part in first]
    second = fresh()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    loop(*second, 2, 6)
    assert second[1].step == 6
    for a, b in zip(straight[:2], second[:2], strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)
    assert second[1].components["feature_distill"] > 0


def test_a_compiled_model_has_one_graph_break_at_the_hook():
    torch._dynamo.reset()
    plain, compiled, x = make(), make(), images()
    plain[1](plain[0](x), labels()).backward()
    model, loss_func = compiled
    if torch.__version__ >= "2.2":
        assert len(torch._dynamo.explain(model)(x).break_reasons) == 1
    torch._dynamo.reset()
    loss_func(torch.compile(model, backend="aot_eager")(x), labels()).backward()
    assert_same_gradients(plain, compiled, rtol=1e-4, atol=1e-5)


def test_rows_are_not_guessed_through_a_compiled_function():
    torch._dynamo.reset()
    model, loss_func = make()
    loss_func.capture = FeatureCapture(model.trunk, "output")
    embeddings = torch.compile(model, backend="aot_eager")(images())
    with pytest.raises(MissingFeaturesError, match="CompiledFunctionBackward.*features="):
        loss_func(embeddings, labels())


def test_what_is_compiled_ends_with_the_embedder():
    torch._dynamo.reset()
    plain, compiled, x = make(), make(), images()
    normalize = torch.nn.functional.normalize
    plain[1](normalize(plain[0](x)), labels()).backward()
    model, loss_func = compiled

    def inside(images):
        return normalize(model(images))

    with pytest.raises(MissingFeaturesError, match="torch.compile: let the embedder come last"):
        loss_func(torch.compile(inside, backend="aot_eager")(x), labels())
    loss_func(normalize(torch.compile(model, backend="aot_eager")(x)), labels()).backward()
    assert_same_gradients(plain, compiled, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_without_graph_break_with_explicit_features():
    torch._dynamo.reset()
    plain, compiled, x = make(), make(embedder=None, feature_dim=F_DIM), images()
    plain[1](plain[0](x), labels()).backward()
    model, loss_func = compiled

    def forward(images):
        features = model.trunk(images).mean(dim=(2, 3))
        return model.embedder(features), features

    embeddings, features = torch.compile(forward, backend="aot_eager", fullgraph=True)(x)
    loss_func(embeddings, labels(), features=features).backward()
    assert_same_gradients(plain, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < "2.2", reason="an internal error of torch.compile")
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"distill_weight": 0.0, "feature_distill_weight": 0.0}])
def test_a_compiled_loss_gives_the_same(settings):
    """Captured features break the graph, where they are read."""
    torch._dynamo.reset()
    plain, compiled, x = make(**settings), make(**settings), images()
    plain[1](plain[0](x), labels()).backward()
    model, loss_func = compiled
    torch.compile(loss_func, backend="eager")(model(x), labels()).backward()
    assert_same_gradients(plain, compiled)
    torch._dynamo.reset()
    assert 0 < torch._dynamo.explain(loss_func)(model(x), labels()).graph_break_count <= 5


@pytest.mark.skipif(torch.__version__ < "2.2", reason="an internal error of torch.compile")
def test_a_compiled_loss_with_explicit_features_is_one_graph():
    torch._dynamo.reset()
    plain, compiled, x = (*(make(feature_distill_delay=1) for _ in range(2)), images())
    step = torch.compile(compiled[1], backend="aot_eager", fullgraph=True)
    for _ in range(3):  # before the features teach, and from then on
        values = []
        for (model, _), loss_func in zip((plain, compiled), (plain[1], step), strict=True):
            features = model.trunk(x).mean(dim=(2, 3))
            values.append(loss_func(model.embedder(features), labels(), features=features))
            values[-1].backward()
        torch.testing.assert_close(*values)
    assert_same_gradients(plain, compiled)
    assert compiled[1].step == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, CPU_FLOAT16])
def test_autocast_changes_no_more_than_the_precision_of_the_model(dtype):
    model, loss_func = make()
    x = images()
    whole = loss_func(model(x), labels())
    with torch.autocast("cpu", dtype=dtype):
        half = loss_func(model(x), labels())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=3e-2, atol=3e-2)


def test_numpy_numbers_in_a_loop():
    model, loss_func = make(
        distill_weight=lambda step: np.float32(2.0), temperature=np.float64(0.5)
    )
    loss_func(model(images()), labels()).backward()
