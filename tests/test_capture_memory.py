"""Backward lets go of the features, whatever is kept of the graph, and never too early."""

import gc
import threading
import weakref

import pytest
import torch
from helpers import F_DIM, B, Model, images, labels
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import FeatureCapture, S2SDLoss
from s2sd_pml.capture import _graph_is_kept
from s2sd_pml.errors import MissingFeaturesError

KNOWS_RETAINED = pytest.mark.skipif(
    _graph_is_kept is bool, reason="this torch does not say whether the graph is retained"
)


@pytest.fixture
def no_gc():
    linear = nn.Linear(1, 1)
    with FeatureCapture(linear):  # the first of a process imports torch.compiler, with cycles
        linear(torch.ones(1, 1)).sum().backward()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["embedder", "trunk"])
def model_and_loss(request):
    model = Model()
    module = getattr(model, request.param)
    loss_func = S2SDLoss(
        losses.NTXentLoss(), feature_dim=F_DIM, head_dims=(8,), **{request.param: module}
    )
    return model, loss_func


def bytes_alive(refs):
    return sum(t.nbytes for ref in refs if (t := ref()) is not None)


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("gather", ["a list of losses", "their sum"])
def test_kept_losses_keep_no_features(model_and_loss, gather):
    model, loss_func = model_and_loss
    history, total, refs = [], 0, []
    for _ in range(3):
        embeddings = model(images())
        features = loss_func.capture.features_of(embeddings)
        refs.append(weakref.ref(features))
        loss = loss_func(embeddings, labels())
        if gather == "their sum":
            total = total + loss
        else:
            history.append(loss)
        assert bytes_alive(refs) == features.nbytes
        loss.backward()
        del embeddings, features
        assert bytes_alive(refs) == 0
    assert total.requires_grad if gather == "their sum" else len(history) == 3


@pytest.mark.usefixtures("no_gc")
def test_kept_embeddings_keep_no_map_after_backward():
    model = Model()
    capture = FeatureCapture(model.trunk, "output")
    embeddings = model(images())
    feature_map = weakref.ref(capture.features_of(embeddings))
    assert feature_map().shape == (B, F_DIM, 4, 4)
    embeddings.sum().backward()
    assert feature_map() is None


@pytest.mark.usefixtures("no_gc")
def test_a_forward_without_backward_is_freed_with_its_embeddings(model_and_loss):
    model, loss_func = model_and_loss
    embeddings = model(images())
    loss = loss_func(embeddings, labels())
    features = weakref.ref(loss_func.capture.features_of(embeddings))
    del embeddings
    assert features() is not None  # the loss may yet go backward
    del loss
    assert features() is None


@pytest.mark.usefixtures("no_gc")
def test_the_hook_of_a_node_keeps_neither_capture_nor_module():
    model = Model()
    capture = FeatureCapture(model.embedder)
    refs = [weakref.ref(model), weakref.ref(model.embedder), weakref.ref(capture)]
    embeddings = model(images())
    del model, capture
    assert [ref() for ref in refs] == [None] * 3
    embeddings.sum().backward()


def test_a_second_loss_after_backward_is_refused_with_the_fix(model_and_loss):
    model, loss_func = model_and_loss
    x = images()
    embeddings = model(x)
    loss_func(embeddings, labels()).backward()
    retain = "" if _graph_is_kept is bool else r"retain_graph=True\).*"
    with pytest.raises(
        MissingFeaturesError, match=rf"released.*before backward.*{retain}features="
    ):
        loss_func(embeddings, labels())
    loss_func(embeddings, labels(), features=model.trunk(x))
    two = torch.cat([embeddings, model(x)])
    with pytest.raises(MissingFeaturesError, match="released"):
        loss_func.capture.features_of(two)


@KNOWS_RETAINED
@pytest.mark.usefixtures("no_gc")
def test_a_retained_graph_keeps_its_features_until_the_last_backward(model_and_loss):
    model, loss_func = model_and_loss
    embeddings = model(images())
    features = loss_func.capture.features_of(embeddings)
    first = loss_func(embeddings, labels())
    first.backward(retain_graph=True)
    assert loss_func.capture.features_of(embeddings) is features
    second = loss_func(embeddings, labels())
    torch.testing.assert_close(second, first)
    second.backward()
    gone = weakref.ref(features)
    del features, first  # whose own part of the graph, with the head, is retained
    assert gone() is None


@pytest.mark.skipif(_graph_is_kept is not bool, reason="of releases of torch that do not say so")
def test_older_releases_of_torch_release_the_features_of_a_retained_graph_too(model_and_loss):
    model, loss_func = model_and_loss
    embeddings = model(images())
    loss_func(embeddings, labels()).backward(retain_graph=True)
    with pytest.raises(MissingFeaturesError, match=r"released.*features=\.\.\."):
        loss_func(embeddings, labels())


def test_gradients_that_do_not_pass_the_module_release_nothing(model_and_loss):
    model, loss_func = model_and_loss
    embeddings = model(images())
    features = loss_func.capture.features_of(embeddings)
    head = loss_func.branches["head_8"].head
    torch.autograd.grad(loss_func(embeddings, labels()), [*head.parameters(), embeddings])
    assert loss_func.capture.features_of(embeddings) is features
    loss_func(embeddings, labels()).backward()
    assert all(p.grad is not None for p in model.parameters())


@KNOWS_RETAINED
def test_two_optimizers_that_share_a_forward():
    """As in adversarial training: one backward retains the graph for the other."""
    model = Model()
    critic = nn.Linear(6, 1)
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=model.embedder, head_dims=(8,))
    for _ in range(2):
        embeddings = model(images())
        critic(embeddings).mean().backward(retain_graph=True)
        loss_func(embeddings, labels()).backward()
    with pytest.raises(MissingFeaturesError, match="released"):
        loss_func(embeddings, labels())


def test_accumulated_losses_of_several_forwards(model_and_loss):
    model, loss_func = model_and_loss
    total = sum(loss_func(model(images()), labels()) for _ in range(3))
    total.backward()
    assert all(p.grad is not None for p in model.parameters())


class Towers(nn.Module):
    """Two embedders in one module, each with its own features."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(F_DIM, 4), nn.Linear(F_DIM, 4)

    def forward(self, x, y):
        return self.one(x), self.two(y)


def test_the_outputs_of_a_module_are_released_one_by_one():
    towers = Towers()
    capture = FeatureCapture(towers)
    x, y = torch.randn(2, B, F_DIM).requires_grad_().unbind()
    one, two = towers(x, y)
    assert capture.features_of(one) is x
    assert capture.features_of(two) is y
    one.sum().backward(inputs=list(towers.one.parameters()))
    assert capture.features_of(two) is y
    with pytest.raises(MissingFeaturesError, match="released"):
        capture.features_of(one)


def test_outputs_of_one_node():
    class Halves(nn.Linear):
        def forward(self, x):
            return super().forward(x).chunk(2, dim=1)

    embedder = Halves(F_DIM, 8)
    capture = FeatureCapture(embedder)
    x = torch.randn(B, F_DIM)
    left, right = embedder(x)
    assert capture.features_of(left) is x
    assert capture.features_of(right) is x
    left.sum().backward()
    with pytest.raises(MissingFeaturesError, match="released"):
        capture.features_of(right)


@pytest.mark.parametrize("side", ["input", "output"])
def test_two_captures_on_one_module(side):
    module = nn.Linear(F_DIM, 4)
    first, second = FeatureCapture(module, side), FeatureCapture(module, side)
    x = torch.randn(B, F_DIM)
    made = module(x)
    expected = x if side == "input" else made
    for capture in (first, second):
        assert torch.equal(capture.features_of(made * 2), expected)
    first.remove()
    made = module(x)
    assert torch.equal(second.features_of(made * 2), expected)
    made.sum().backward()
    for capture in (first, second):
        with pytest.raises(MissingFeaturesError):
            capture.features_of(made * 2)


@pytest.mark.parametrize("named", ["embedder", "trunk"])
def test_two_losses_on_one_forward_give_the_gradients_of_explicit_features(named):
    model = Model()
    made = {"feature_dim": F_DIM, "head_dims": (8,), named: getattr(model, named)}
    one, two = S2SDLoss(losses.NTXentLoss(), **made), S2SDLoss(losses.ContrastiveLoss(), **made)
    x = images()

    def gradients(explicit):
        model.zero_grad()
        embeddings = model(x)
        given = {"features": model.trunk(x)} if explicit else {}
        sum(loss(embeddings, labels(), **given) for loss in (one, two)).backward()
        return [p.grad.clone() for p in model.parameters()]

    for captured, explicit in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(captured, explicit)


@pytest.mark.usefixtures("no_gc")
def test_a_compiled_model_lets_go_as_well():
    torch._dynamo.reset()
    model = Model()
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=model.embedder, head_dims=(8,))
    compiled = torch.compile(model, backend="aot_eager")
    compiled(images())
    gc.collect()  # of the compilation
    embeddings = compiled(images())
    features = weakref.ref(loss_func.capture.features_of(embeddings))
    loss = loss_func(embeddings, labels())
    loss.backward()
    del embeddings
    assert features() is None
    assert loss.requires_grad


def test_backward_in_other_threads(model_and_loss):
    model, loss_func = model_and_loss
    embeddings = [model(images()) for _ in range(3)]
    values = [loss_func(e, labels()) for e in embeddings]
    threads = [threading.Thread(target=value.backward) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for e in embeddings:
        with pytest.raises(MissingFeaturesError, match="released"):
            loss_func.capture.features_of(e)
