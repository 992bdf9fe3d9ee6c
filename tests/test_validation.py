"""Bad arguments and batches are refused: the message has the offending value and a fix."""

import copy

import numpy as np
import pytest
import torch
from helpers import Custom, Model, images
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.utils.distributed import (
    DistributedLossWrapper,
    DistributedMinerWrapper,
)
from torch import nn

from s2sd_pml import S2SDLoss, refusals, validation
from s2sd_pml.errors import (
    ArgumentError,
    BatchError,
    MissingFeaturesError,
    S2SDError,
    UnsupportedLossError,
)

# --- arguments and settings -------------------------------------------------------------------

LOSS, LINEAR, CONV = losses.TripletMarginLoss(), nn.Linear(12, 6), nn.Conv2d(3, 12, 1)


class Scaled(losses.TripletMarginLoss):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))


BAD_ARGUMENTS = {
    "class": ((losses.TripletMarginLoss,), {}, ArgumentError, "is a class. Pass an instance"),
    "no_loss": ((3,), {}, ArgumentError, "loss=3"),
    "miner_class": ((LOSS, miners.HDCMiner), {}, ArgumentError, "Pass an instance"),
    "miner_layer": ((LOSS, LINEAR), {}, ArgumentError, "Linear is a layer.*embedder="),
    "miner_type": ((LOSS, "hard"), {}, ArgumentError, "miner='hard'"),
    "both": ((LOSS,), {"trunk": CONV}, ArgumentError, "Both embedder=Linear and trunk=Conv2d"),
    "embedder_type": ((LOSS,), {"embedder": "fc"}, ArgumentError, "embedder='fc'"),
    "nothing": ((LOSS,), {"embedder": None}, ArgumentError, "neither embedder nor trunk"),
    "trunk_only": (
        (LOSS,),
        {"embedder": None, "trunk": CONV},
        ArgumentError,
        "feature_dim=<width of the trunk",
    ),
    "conv_embedder": ((LOSS,), {"embedder": CONV}, ArgumentError, "cannot be read off.*Conv2d"),
    "lazy": ((LOSS,), {"embedder": nn.LazyLinear(6)}, ArgumentError, "dimension is unknown"),
    "feature_dim_differs": ((LOSS,), {"feature_dim": 13}, ArgumentError, "13.*takes 12"),
    "feature_dim_type": ((LOSS,), {"feature_dim": 12.0}, ArgumentError, "feature_dim=12.0"),
    "dims_int": ((LOSS,), {"head_dims": 512}, ArgumentError, r"such as \(512, 1024\)"),
    "dims_zero": ((LOSS,), {"head_dims": (0,)}, ArgumentError, "above 0"),
    "dims_float": ((LOSS,), {"head_dims": (5.5,)}, ArgumentError, "5.5"),
    "dims_twice": ((LOSS,), {"head_dims": (8, 8)}, ArgumentError, r"\(8, 8\) repeats"),
    "distill_weight": ((LOSS,), {"distill_weight": -1}, ArgumentError, "distill_weight=-1"),
    "distill_weight_nan": (
        (LOSS,),
        {"distill_weight": float("nan")},
        ArgumentError,
        "distill_weight=nan",
    ),
    "distill_weight_type": (
        (LOSS,),
        {"distill_weight": "50"},
        ArgumentError,
        "distill_weight='50'",
    ),
    "feature_distill_weight": (
        (LOSS,),
        {"feature_distill_weight": -0.5},
        ArgumentError,
        "feature_distill_weight=-0.5",
    ),
    "temperature": ((LOSS,), {"temperature": 0}, ArgumentError, "temperature=0"),
    "temperature_type": ((LOSS,), {"temperature": None}, ArgumentError, "temperature=None"),
    "delay": ((LOSS,), {"feature_distill_delay": -1}, ArgumentError, "feature_distill_delay=-1"),
    "delay_float": (
        (LOSS,),
        {"feature_distill_delay": 1e3},
        ArgumentError,
        "feature_distill_delay=1000.0",
    ),
    "chunk": ((LOSS,), {"chunk_size": 0}, ArgumentError, "chunk_size=0"),
    "exclude_self": ((LOSS,), {"exclude_self": 1}, ArgumentError, "exclude_self=1"),
    "gather": ((LOSS,), {"gather_distributed": "yes"}, ArgumentError, "gather_distributed='yes'"),
    "pooling": ((LOSS,), {"pooling": "max"}, ArgumentError, "'max'.*'avg\\+max'"),
    "head": ((LOSS,), {"head": 3}, ArgumentError, "head=3"),
    "head_returns": ((LOSS,), {"head": lambda i, o: o}, ArgumentError, r"returned int"),
    "dict": (
        (losses.TripletMarginLoss(reducer=reducers.DoNothingReducer()),),
        {},
        UnsupportedLossError,
        "DoNothingReducer.*MeanReducer",
    ),
    "dict_inside": (
        (losses.MultipleLosses([LOSS, losses.NTXentLoss(reducer=reducers.DoNothingReducer())]),),
        {},
        UnsupportedLossError,
        "DoNothingReducer",
    ),
    "nested": (
        (S2SDLoss(LOSS, embedder=LINEAR, head_dims=(8,)),),
        {},
        UnsupportedLossError,
        "Wrap the loss once",
    ),
    "distributed": (
        (DistributedLossWrapper(LOSS),),
        {},
        UnsupportedLossError,
        "gather_distributed=True",
    ),
    "distributed_miner": (
        (LOSS, DistributedMinerWrapper(miners.HDCMiner())),
        {},
        UnsupportedLossError,
        "gather_distributed=True",
    ),
    "unknown_parameters": (
        (Scaled(),),
        {},
        UnsupportedLossError,
        r"'scale' of shape \(6,\).*factory",
    ),
    "dims_none": ((LOSS,), {"head_dims": None}, ArgumentError, "head_dims=None"),
    "function": (
        (lambda e, y: 0,),
        {},
        UnsupportedLossError,
        "failed for dimension 6.*must be an nn.Module",
    ),
    "factory_shares": ((lambda dim: LOSS,), {}, UnsupportedLossError, "same TripletMarginLoss"),
    "heads_shared": (
        (LOSS,),
        {"head": lambda i, o: LINEAR, "head_dims": (6, 7)},
        UnsupportedLossError,
        "head factory returned the same Linear",
    ),
    "miner_without_pairs": (
        (losses.VICRegLoss(), miners.HDCMiner()),
        {},
        ArgumentError,
        "VICRegLoss takes no pairs.*HDCMiner.*Leave the miner out",
    ),
    "miner_twice": (
        (losses.MultipleLosses([LOSS], [miners.HDCMiner()]), miners.HDCMiner()),
        {},
        ArgumentError,
        "has miners of its own",
    ),
    "factory_returns": (
        (lambda dim: dim,),
        {},
        UnsupportedLossError,
        "returned int for dimension 6",
    ),
    "factory_size": (
        (lambda dim: LOSS,),
        {"embedder": None, "feature_dim": 12},
        ArgumentError,
        "embedding_size=",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    args, kwargs, error, words = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=words) as caught:
        S2SDLoss(*args, **{"embedder": LINEAR, "head_dims": (8,), **kwargs})
    assert isinstance(caught.value, S2SDError)
    assert isinstance(caught.value, ValueError)


FIXED_ARGUMENTS = {
    "class": ((losses.TripletMarginLoss(),), {}),
    "class, factory": ((lambda dim: losses.TripletMarginLoss(),), {}),
    "miner_class": ((LOSS, miners.HDCMiner()), {}),
    "miner_layer": ((LOSS,), {"embedder": LINEAR}),
    "both": ((LOSS,), {"embedder": None, "trunk": CONV, "feature_dim": 12}),
    "nothing": ((LOSS,), {"embedder": None, "feature_dim": 12}),
    "feature_dim_differs": ((LOSS,), {"embedder": LINEAR}),
    "dims_int": ((LOSS,), {"head_dims": (512, 1024)}),
    "dims_twice": ((LOSS,), {"head_dims": (512, 513)}),
    "chunk": ((LOSS,), {"chunk_size": None}),
    "dict": ((losses.TripletMarginLoss(reducer=reducers.MeanReducer()),), {}),
    "nested": ((LOSS,), {"head_dims": (8, 9)}),
    "distributed": ((LOSS,), {"gather_distributed": True}),
    "distributed_miner": ((LOSS, miners.HDCMiner()), {"gather_distributed": True}),
    "unknown_parameters": ((lambda dim: Scaled(),), {}),
    "miner_without_pairs": ((losses.VICRegLoss(),), {}),
    "factory_size": (
        (lambda dim: losses.TripletMarginLoss(),),
        {"embedder": None, "feature_dim": 12, "embedding_size": 6},
    ),
}


@pytest.mark.parametrize("case", FIXED_ARGUMENTS)
def test_what_the_message_suggests_works(case):
    args, kwargs = FIXED_ARGUMENTS[case]
    S2SDLoss(*args, **{"embedder": LINEAR, "head_dims": (8,), **kwargs})


def test_a_loss_is_known_by_its_type_and_not_by_its_name():
    class Mine(losses.VICRegLoss):
        pass

    class PNPLoss(losses.ContrastiveLoss):
        pass

    settings = {"embedder": LINEAR, "head_dims": (8,)}
    with pytest.raises(ArgumentError, match="Mine takes no pairs.*HDCMiner"):
        S2SDLoss(Mine(), miners.HDCMiner(), **settings)
    loss_func = S2SDLoss(PNPLoss(), miners.HDCMiner(), **settings)
    loss_func(LINEAR(torch.randn(8, 12)), torch.arange(8) // 2).backward()
    namesake = type("S2SDLoss", (losses.ContrastiveLoss,), {})
    S2SDLoss(namesake(), **settings)


@pytest.mark.parametrize(
    "embedder",
    [
        LINEAR,
        nn.Sequential(nn.Flatten(), nn.Dropout(), LINEAR, nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.ReLU(), LINEAR)),
        nn.DataParallel(nn.Sequential(LINEAR)),
    ],
    ids=["linear", "sequential", "nested", "parallel"],
)
def test_the_feature_dimension_is_read_off_the_embedder(embedder):
    assert S2SDLoss(LOSS, embedder=embedder, head_dims=(8,)).feature_dim == 12


def test_feature_dim_is_enough_with_explicit_features_and_unneeded_without_heads():
    loss_func = S2SDLoss(LOSS, feature_dim=12, head_dims=(8,), feature_distill_delay=0)
    z = torch.randn(8, 6, requires_grad=True)
    loss_func(z, torch.arange(8) // 2, features=torch.randn(8, 12)).backward()
    transparent = S2SDLoss(LOSS, head_dims=(), feature_distill_weight=0)
    transparent(z, torch.arange(8) // 2).backward()


def test_a_feature_dim_given_is_taken_where_the_embedder_pools_or_reshapes():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    loss_func = S2SDLoss(LOSS, embedder=flat, feature_dim=3, head_dims=(8,))
    feature_map = torch.randn(8, 3, 2, 2)
    loss_func(flat(feature_map), torch.arange(8) // 2).backward()
    both = S2SDLoss(
        LOSS,
        embedder=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)),
        feature_dim=6,
        pooling=lambda m: torch.cat([m.mean((2, 3)), m.amax((2, 3))], 1),
        head_dims=(8,),
    )
    assert both.feature_dim == 6


def test_the_width_of_a_compiled_embedder_is_known():
    compiled = torch.compile(nn.Linear(12, 6))
    assert S2SDLoss(LOSS, embedder=compiled, head_dims=(8,)).feature_dim == 12


def test_a_pooling_module_of_the_model_stays_the_models():
    pool = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loss_func = S2SDLoss(LOSS, feature_dim=3, pooling=pool, head_dims=(8,), feature_distill_delay=0)
    own = {id(p) for p in loss_func.parameters()}
    assert own.isdisjoint(id(p) for p in pool.parameters())
    assert copy.deepcopy(loss_func).pooling.module is pool
    z = torch.randn(8, 4, requires_grad=True)
    loss_func(z, torch.arange(8) // 2, features=torch.randn(8, 3, 2, 2)).backward()
    assert pool[0].weight.grad is not None


def test_numpy_and_tensor_numbers_are_numbers():
    loss_func = S2SDLoss(
        LOSS,
        embedder=LINEAR,
        head_dims=np.array([8, 9]),
        feature_distill_delay=np.int64(0),
        temperature=np.float32(0.5),
        chunk_size=np.int64(3),
        distill_weight=lambda step: np.float32(2.0),
        feature_distill_weight=lambda step: torch.tensor(2.0),
    )
    loss_func(LINEAR(torch.randn(8, 12)), torch.arange(8) // 2).backward()
    assert loss_func.head_dims == (8, 9)


def test_a_factory_with_a_size_given():
    loss_func = S2SDLoss(
        lambda dim: losses.ArcFaceLoss(4, dim), feature_dim=12, embedding_size=6, head_dims=(8,)
    )
    assert loss_func.loss.W.shape == (6, 4)
    assert loss_func.branches["head_8"].loss.W.shape == (8, 4)


def test_a_weight_of_a_schedule_is_refused_with_its_step():
    loss_func = S2SDLoss(LOSS, embedder=LINEAR, head_dims=(8,), distill_weight=lambda step: -step)
    loss_func(LINEAR(torch.randn(8, 12)), torch.arange(8) // 2)
    with pytest.raises(ArgumentError, match="distill_weight=-1 at step 1 must be a finite number"):
        loss_func(LINEAR(torch.randn(8, 12)), torch.arange(8) // 2)


@pytest.mark.skipif(torch.__version__ < "2.4", reason="fullgraph works from there on")
def test_checks_and_attributes_are_compiled_without_a_graph_break():
    loss_func = S2SDLoss(LOSS, feature_dim=12, head_dims=(8,), feature_distill_weight=lambda s: 2.0)

    class Checked(S2SDLoss):
        def forward(self, embeddings, labels):
            validation.check_settings(self)
            validation.check_batch(embeddings, labels, None, None, self.loss)
            validation.check_rows(embeddings, embeddings, "features")
            value = embeddings.sum() * validation.check_weight("w", self.feature_distill_weight(3))
            refusals.check_loss_value(value, self.loss)
            self.components = {"base": value.detach()}
            return value * len(self.head_dims) * self.distance.p

    loss_func.__class__ = Checked
    found = torch.compile(loss_func, fullgraph=True, backend="eager")(X, Y)
    torch.testing.assert_close(found, loss_func(X, Y))
    torch.testing.assert_close(found, 4 * X.sum())


# --- batches ----------------------------------------------------------------------------------

X, Y, PHI = torch.randn(8, 6), torch.arange(8) // 2, torch.randn(8, 12)

BAD_BATCHES = {
    "embeddings_list": ((X.tolist(), Y), {}, BatchError, "list"),
    "embeddings_int": ((X.long(), Y), {}, BatchError, "int64"),
    "embeddings_1d": ((X[0], Y), {}, BatchError, r"\(6,\)"),
    "empty": ((X[:0], Y[:0]), {}, BatchError, "drop_last"),
    "labels_list": ((X, Y.tolist()), {}, BatchError, "torch.as_tensor"),
    "labels_length": ((X, Y[:5]), {}, BatchError, r"\(5,\).*8 embeddings"),
    "labels_2d": ((X, Y[:, None]), {}, BatchError, r"\(8, 1\)"),
    "ref_1d": ((X, Y), {"ref_emb": X[0]}, BatchError, "ref_emb has shape"),
    "labels_for_ssl": ((X, Y), {"ref_emb": X, "ref_features": PHI}, BatchError, "takes no labels"),
    "no_features": ((X, Y), {"features": None}, MissingFeaturesError, "features=.*embedder="),
    "no_ref_features": (
        (X, Y),
        {"ref_emb": X.clone(), "ref_labels": Y},
        MissingFeaturesError,
        "ref_features=",
    ),
    "features_rows": ((X, Y), {"features": PHI[:5]}, BatchError, r"\(5, 12\).*8 embed"),
    "features_width": ((X, Y), {"features": PHI[:, :7]}, BatchError, "feature_dim=12"),
    "features_int": ((X, Y), {"features": PHI.long()}, BatchError, "int64"),
    "features_3d": ((X, Y), {"features": PHI[:, :, None]}, BatchError, r"\(8, 12, 1\)"),
    "features_map": (
        (X, Y),
        {"features": torch.randn(8, 7, 2, 2)},
        BatchError,
        r"\(8, 7, 2, 2\) has width 7",
    ),
    "features_device": (
        (X, Y),
        {"features": PHI.to("meta")},
        BatchError,
        r"meta.*features.to\('cpu'\)",
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches(case):
    args, kwargs, error, words = BAD_BATCHES[case]
    loss = losses.NTXentLoss()
    if case == "labels_for_ssl":
        loss = losses.SelfSupervisedLoss(loss)
    loss_func = S2SDLoss(loss, feature_dim=12, head_dims=(8,))
    with pytest.raises(error, match=words) as caught:
        loss_func(*args, **{"features": PHI, **kwargs})
    assert isinstance(caught.value, S2SDError)
    assert int(loss_func.step) == 0


FIXED_BATCHES = {
    "labels_list": ((X, torch.as_tensor(Y.tolist())), {}),
    "labels_2d": ((X, Y[:, None].reshape(8)), {}),
    "labels_for_ssl": ((X,), {"ref_emb": X, "ref_features": PHI}),
    "no_ref_features": ((X, Y), {"ref_emb": X.clone(), "ref_labels": Y, "ref_features": PHI}),
    "features_width": ((X, Y), {"features": PHI[:, :7]}),  # with feature_dim=7
}


@pytest.mark.parametrize("case", FIXED_BATCHES)
def test_batches_as_the_message_suggests(case):
    args, kwargs = FIXED_BATCHES[case]
    loss = losses.NTXentLoss()
    loss = losses.SelfSupervisedLoss(loss) if case == "labels_for_ssl" else loss
    features = kwargs.get("features", PHI)
    loss_func = S2SDLoss(loss, feature_dim=features.shape[1], head_dims=(8,))
    assert loss_func(*args, **{"features": PHI, **kwargs}).isfinite()


def test_features_of_inference_mode_as_the_message_suggests():
    with torch.inference_mode():
        features = torch.randn(8, 12)
    loss_func = S2SDLoss(losses.NTXentLoss(), feature_dim=12, head_dims=(8,))
    with pytest.raises(MissingFeaturesError, match=r"pass features\.clone\(\)"):
        loss_func(X, Y, features=features)
    loss_func(X, Y, features=features.clone()).backward()


def test_labels_are_not_read_from_their_device_unless_they_are_floats(monkeypatch):
    def read(*_):
        raise AssertionError("read from the device")

    labels = Y.clone()
    for name in ("__bool__", "item", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, read)
    validation.check_batch(X, labels, None, None, LOSS)
    with pytest.raises(AssertionError, match="read from the device"):
        validation.check_batch(X, labels.float(), None, None, LOSS)


def test_pooled_features_for_msdfa_are_refused():
    loss_func = S2SDLoss.msdfa(losses.NTXentLoss(), feature_dim=12, head_dims=(8,))
    with pytest.raises(BatchError, match="pooled already"):
        loss_func(X, Y, features=PHI)


@pytest.mark.parametrize("wrapper", ["memory", "multiple"])
def test_ref_emb_where_the_loss_takes_none(wrapper):
    inner = losses.ContrastiveLoss()
    loss = (
        losses.CrossBatchMemory(inner, 6) if wrapper == "memory" else losses.MultipleLosses([inner])
    )
    loss_func = S2SDLoss(loss, feature_dim=12, head_dims=(8,))
    with pytest.raises(BatchError, match="takes no ref_emb"):
        loss_func(X, Y, features=PHI, ref_emb=X, ref_labels=Y, ref_features=PHI)


def custom(value, **kwargs):
    return S2SDLoss(Custom(value), feature_dim=12, head_dims=(8,), **kwargs)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"loss": 1, "accuracy": 2}, r"returned a dict\. .*return the loss alone"),
        (torch.ones(8), r"shape \(8,\).*return a scalar, such as its \.mean\(\)"),
        ((torch.ones(()), 0.5), r"returned a tuple\. .*loss alone.*such as self\.accuracy"),
        ([torch.ones(())], "returned a list.*loss alone"),
        (None, "returned a NoneType.*return the loss alone, as a scalar tensor"),
        ("0.5", "returned a str"),
    ],
    ids=["dict", "rows", "tuple", "list", "nothing", "text"],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_loss_that_returns_no_scalar(value, words, training):
    loss_func = custom(value).train(training)
    with pytest.raises(UnsupportedLossError, match=words):
        loss_func(X, Y, features=PHI)


def test_the_loss_alone_and_an_attribute_as_the_message_suggests():
    class Accurate(losses.ContrastiveLoss):
        def forward(self, *args, **kwargs):
            self.accuracy = 0.5
            return super().forward(*args, **kwargs)

    loss_func = S2SDLoss(Accurate(), feature_dim=12, head_dims=(8,))
    assert loss_func(X, Y, features=PHI).isfinite()
    assert loss_func.accuracy == 0.5
    assert custom(lambda z, y: (z**2).sum(1).mean())(X, Y, features=PHI).isfinite()


def test_labels_of_a_custom_loss_are_passed_on():
    def multi_hot(embeddings, labels):
        assert labels.shape == (8, 5)
        return nn.functional.binary_cross_entropy_with_logits(embeddings[:, :5], labels)

    labels = torch.randint(2, (8, 5)).float()
    loss_func = custom(multi_hot)
    loss_func(X, labels, features=PHI).backward()
    loss_func.eval()(X, labels)
    with pytest.raises(BatchError, match=r"labels have shape \(7, 5\) but there are 8 embeddings"):
        loss_func.train()(X, labels[:7], features=PHI)
    both = S2SDLoss(losses.MultipleLosses([Custom(multi_hot)]), feature_dim=12, head_dims=(8,))
    with pytest.raises(BatchError, match=r"shape \(\)"):
        both(X, torch.tensor(3), features=PHI)


@pytest.mark.parametrize(
    "loss",
    [
        losses.ContrastiveLoss(),
        type("Mine", (losses.ContrastiveLoss,), {})(),
        losses.CrossBatchMemory(losses.ContrastiveLoss(), 6),
        losses.MultipleLosses([Custom(0), losses.ContrastiveLoss()]),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_of_pml_take_one_class_for_each_sample(loss):
    loss_func = S2SDLoss(loss, feature_dim=12, head_dims=(8,))
    with pytest.raises(
        BatchError, match=rf"\(8, 5\).*{type(loss).__name__} takes one class.*\(8,\)"
    ):
        loss_func(X, torch.ones(8, 5), features=PHI)
    assert loss_func(X, torch.ones(8, 5).argmax(1), features=PHI).isfinite()


def test_a_loss_that_returns_a_number_still_has_a_graph():
    class Nothing(nn.Module):
        def forward(self, embeddings, labels):
            return 0

    z = X.clone().requires_grad_()
    S2SDLoss(Nothing(), feature_dim=12, head_dims=(8,))(z, Y, features=PHI).backward()
    assert z.grad is not None


def test_a_momentum_encoders_references_need_their_features():
    model = Model()
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss())
    loss_func = S2SDLoss(loss, embedder=model.embedder, head_dims=(8,))
    x = images(8)
    with torch.no_grad():
        references, phi = model(images(8)), model.trunk(images(8)).mean(dim=(2, 3))
    with pytest.raises(MissingFeaturesError, match="ref_emb, of shape .*Pass ref_features=") as e:
        loss_func(model(x), ref_emb=references)
    assert "eval()" not in str(e.value)
    loss_func(model(x), ref_emb=references, ref_features=phi).backward()
    without_heads = S2SDLoss(loss, embedder=model.embedder, head_dims=(), feature_distill_delay=0)
    without_heads(model(x), ref_emb=references).backward()  # no head projects them
    assert without_heads.components["feature_distill"] > 0


def test_a_head_of_the_wrong_width():
    loss_func = S2SDLoss(
        losses.NTXentLoss(), feature_dim=12, head_dims=(8,), head=lambda i, o: nn.Linear(i, o + 1)
    )
    with pytest.raises(BatchError, match=r"dimension 8.*\(8, 9\)"):
        loss_func(X, Y, features=PHI)


def test_a_schedule_may_return_an_array_of_no_dimension():
    loss_func = S2SDLoss(
        losses.ContrastiveLoss(),
        feature_dim=12,
        head_dims=(8,),
        distill_weight=lambda step: np.array(3.0),
    )
    loss_func(LINEAR(torch.randn(8, 12)), torch.arange(8) // 2, features=torch.randn(8, 12))
