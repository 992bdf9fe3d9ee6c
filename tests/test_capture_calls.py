"""Modules that are called with, or return, dicts, tuples, lists, named tuples and dataclasses."""

import functools
import gc
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import F_DIM, B, labels
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import FeatureCapture, S2SDLoss
from s2sd_pml.capture import MAX_NODES
from s2sd_pml.errors import MissingFeaturesError


class Named(NamedTuple):
    features: Any = None
    mask: Any = None
    other: Any = None


@dataclass
class Plain:
    features: Any = None
    mask: Any = None
    other: Any = None


@dataclass(frozen=True)
class Frozen:
    features: Any = None
    mask: Any = None
    other: Any = None


def hugging_face(**values):
    outputs = pytest.importorskip("transformers.modeling_outputs")
    known = {"features": "last_hidden_state", "other": "pooler_output"}
    made = {known[k]: v for k, v in values.items() if k in known}
    return outputs.BaseModelOutputWithPooling(**made)


MAKE = {
    "dict": lambda **values: dict(values),
    "tuple": lambda **values: tuple(values.values()),
    "list": lambda **values: list(values.values()),
    "named tuple": Named,
    "dataclass": Plain,
    "frozen dataclass": Frozen,
    "ModelOutput": hugging_face,
}


def first_of(structure):
    if isinstance(structure, dict):
        return structure.get("features", structure.get("last_hidden_state"))
    return structure[0] if isinstance(structure, (tuple, list)) else structure.features


def features(n=B, requires_grad=True):
    return torch.randn(n, F_DIM, requires_grad=requires_grad) * 1


class TakesAStructure(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(F_DIM, 4)

    def forward(self, batch):
        return self.linear(first_of(batch))


class ReturnsAStructure(nn.Module):
    def __init__(self, make, with_input=False):
        super().__init__()
        self.linear, self.make, self.with_input = nn.Linear(F_DIM, 4), make, with_input

    def forward(self, x):
        made = self.linear(x)
        other = {"other": x} if self.with_input else {}
        return self.make(features=made, mask=torch.ones(len(x)).long(), **other)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_the_one_tensor_inside_is_found(kind, by_keyword, requires_grad):
    embedder, x = TakesAStructure(), features(requires_grad=requires_grad)
    capture = FeatureCapture(embedder)
    batch = MAKE[kind](features=x, mask=torch.ones(B, 3, dtype=torch.long))
    embeddings = embedder(batch=batch) if by_keyword else embedder(batch)
    assert capture.features_of(F.normalize(embeddings)) is x


@pytest.mark.parametrize("with_input", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_an_embedder_that_returns_a_structure(kind, with_input):
    embedder, x = ReturnsAStructure(MAKE[kind], with_input), features()
    capture = FeatureCapture(embedder)
    returned = embedder(x)
    assert capture.features_of(first_of(returned)) is x
    gone = weakref.ref(x)
    del x, returned
    gc.collect()
    assert gone() is None  # a note on the input's own node would keep itself alive


@pytest.mark.parametrize("kind", MAKE)
def test_a_trunk_that_returns_a_structure(kind):
    trunk, embedder = ReturnsAStructure(MAKE[kind], with_input=True), nn.Linear(4, 3)
    capture = FeatureCapture(trunk, "output")
    x = features()
    returned = trunk(x)
    assert type(returned) is type(trunk.make(features=x))
    embeddings = embedder(first_of(returned))
    found = capture.features_of(embeddings)
    assert torch.equal(found, trunk.linear(x))
    found.sum().backward(retain_graph=True)
    assert trunk.linear.weight.grad is not None
    gone = weakref.ref(found)
    del found, returned, embeddings
    gc.collect()
    assert gone() is None


class Fuses(nn.Module):
    """Uses one of its tensors, or two."""

    def __init__(self, names):
        super().__init__()
        self.names, self.linear = names, nn.Linear(F_DIM, 4)

    def forward(self, batch):
        return self.linear(functools.reduce(torch.add, [batch[name] for name in self.names]))


def test_of_several_tensors_the_one_that_the_module_computed_with():
    tokens = torch.randn(B, 5, F_DIM, requires_grad=True)
    pooled = tokens.tanh().mean(dim=1)
    batch = {"tokens": tokens, "pooled": pooled, "leaf": features().detach().requires_grad_()}
    for name in ("pooled", "leaf"):
        embedder = Fuses([name])
        with FeatureCapture(embedder) as capture:
            assert capture.features_of(embedder(batch)) is batch[name]
    embedder = Fuses(["pooled", "leaf"])
    capture = FeatureCapture(embedder)
    with pytest.raises(MissingFeaturesError, match=r"3 floating point.*\(24, 5, 12\).*embedder=<"):
        capture.features_of(embedder(batch))


def test_of_several_tensors_without_gradient_it_is_not_known_and_the_fixes_work():
    embedder = Fuses(["pooled"])
    batch = {"tokens": torch.randn(B, 5, F_DIM), "pooled": features(requires_grad=False)}
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=embedder, feature_dim=F_DIM, head_dims=(8,))
    with pytest.raises(
        MissingFeaturesError, match=r"unclear which.*module inside.*nn\.Linear.*features=\.\.\."
    ):
        loss_func(embedder(batch), labels())
    loss_func(embedder(batch), labels(), features=batch["pooled"]).backward()
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=embedder.linear, head_dims=(8,))
    embeddings = embedder(batch)
    assert loss_func.capture.features_of(embeddings) is batch["pooled"]
    loss_func(embeddings, labels()).backward()


def test_a_large_embedder_is_not_searched_to_its_end():
    class Deep(Fuses):
        def forward(self, batch):
            made = super().forward(batch)
            for _ in range(MAX_NODES):
                made = made + 0
            return made

    embedder = Deep(["x"])
    capture = FeatureCapture(embedder)
    with pytest.raises(MissingFeaturesError, match="2 floating point"):
        capture.features_of(embedder({"x": features(), "y": features()}))


def dense(**kwargs):
    """sentence-transformers' Dense: takes a dict, and returns it with an entry replaced."""
    if torch.__version__ < "2.4":
        pytest.skip("transformers wants a later torch")
    pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers.models import Dense
    return Dense(in_features=F_DIM, out_features=4, **kwargs)


def sentence_features(requires_grad=True):
    tokens = torch.randn(B, 5, F_DIM, requires_grad=requires_grad) * 1
    mask = torch.ones(B, 5, dtype=torch.long)
    return {
        "input_ids": mask,
        "attention_mask": mask,
        "token_embeddings": tokens,
        "sentence_embedding": tokens.mean(dim=1),
    }


@pytest.mark.parametrize("use_residual", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_dense_of_sentence_transformers(autocast, use_residual):
    kwargs = {"use_residual": True} if use_residual else {}
    try:
        embedder = dense(**kwargs)
    except TypeError:
        pytest.skip("this release has no residual")
    loss_func = S2SDLoss(losses.NTXentLoss(), embedder=embedder, feature_dim=F_DIM, head_dims=(8,))
    batch = sentence_features()
    pooled = batch["sentence_embedding"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        embeddings = embedder(batch)["sentence_embedding"]
    assert embeddings.shape == (B, 4)
    assert loss_func.capture.features_of(F.normalize(embeddings)) is pooled
    loss_func(embeddings, labels()).backward()


def test_dense_on_a_frozen_model_names_the_layer_inside():
    embedder = dense()
    capture = FeatureCapture(embedder)
    batch = sentence_features(requires_grad=False)
    pooled = batch["sentence_embedding"]
    with pytest.raises(MissingFeaturesError, match="such as an nn.Linear: embedder="):
        capture.features_of(embedder(dict(batch))["sentence_embedding"])
    del batch["token_embeddings"]
    assert capture.features_of(embedder(dict(batch))["sentence_embedding"]) is pooled
    capture = FeatureCapture(embedder.linear)
    batch = sentence_features(requires_grad=False)
    pooled = batch["sentence_embedding"]
    assert capture.features_of(embedder(batch)["sentence_embedding"]) is pooled


def test_pooling_of_sentence_transformers_as_the_trunk():
    embedder = dense()

    class Pooling(nn.Module):
        def forward(self, batch):
            batch["sentence_embedding"] = batch["token_embeddings"].mean(dim=1)
            return batch

    pooling = Pooling()
    capture = FeatureCapture(pooling, "output")
    batch = sentence_features()
    del batch["sentence_embedding"]
    embeddings = embedder(pooling(batch))["sentence_embedding"]
    assert torch.equal(capture.features_of(embeddings), batch["token_embeddings"].mean(dim=1))


def test_a_tensor_changed_in_place_inside_a_dict_is_refused():
    class InPlace(TakesAStructure):
        def forward(self, batch):
            batch["features"].relu_()
            return super().forward(batch)

    embedder = InPlace()
    capture = FeatureCapture(embedder)
    with pytest.raises(MissingFeaturesError, match="changes its input in place"):
        capture.features_of(embedder({"features": features()}))


def test_a_structure_handed_on_as_it_is_has_no_features():
    embedder = nn.Identity()
    capture = FeatureCapture(embedder)
    batch = embedder({"features": features()})
    with pytest.raises(MissingFeaturesError, match="No captured forward"):
        capture.features_of(batch["features"])


@pytest.mark.skipif(torch.__version__ < "2.2", reason="looks into the dict of a compiled forward")
def test_a_compiled_forward_uses_nothing_of_an_earlier_one_that_failed():
    torch._dynamo.reset()
    embedder = TakesAStructure()
    capture = FeatureCapture(embedder)
    with pytest.raises(RuntimeError):
        embedder({"features": torch.randn(3, F_DIM + 1)})
    compiled = torch.compile(embedder, backend="aot_eager")
    embeddings = compiled({"features": features()})
    with pytest.raises(MissingFeaturesError, match=r"0 floating point.*embedder="):
        capture.features_of(embeddings)
    torch._dynamo.reset()
    x = features()
    capture = FeatureCapture(embedder.linear)  # the fix in the error
    embeddings = torch.compile(embedder, backend="aot_eager")({"features": x})
    assert torch.equal(capture.features_of(embeddings), x)


def test_tensors_of_inference_mode_do_not_disturb_a_forward():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(F_DIM))

        def forward(self, x):
            return self.shift + x

    embedder = Shifts()
    capture = FeatureCapture(embedder)
    with torch.inference_mode():
        x = torch.randn(B, F_DIM)
    with pytest.raises(MissingFeaturesError, match="0 floating point"):
        capture.features_of(embedder(x))
