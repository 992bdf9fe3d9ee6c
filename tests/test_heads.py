"""Projection head and pooling against the definitions written out; widths of embedders."""

import pytest
import torch
from pytorch_metric_learning import losses
from torch import nn

from s2sd_pml import ProjectionHead, S2SDLoss
from s2sd_pml.errors import BatchError
from s2sd_pml.heads import input_width, is_linear, output_width, pool


def test_the_head_is_linear_relu_linear():
    head, x = ProjectionHead(5, 7), torch.randn(3, 5)
    w1, b1, w2, b2 = head.hidden.weight, head.hidden.bias, head.output.weight, head.output.bias
    torch.testing.assert_close(head(x), (x @ w1.T + b1).clamp(min=0) @ w2.T + b2)
    assert (w1.shape, w2.shape) == ((7, 5), (7, 7))
    assert not any(name[0].isdigit() for name, _ in head.named_children())  # record_keeper


@pytest.mark.parametrize("channels_last", [True, False])
def test_pooling(channels_last):
    x = torch.randn(4, 6, 3, 5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    average, maximum = x.flatten(2).mean(2), x.flatten(2).max(2).values
    torch.testing.assert_close(pool(x, "avg"), average)
    torch.testing.assert_close(pool(x, "avg+max"), average + maximum)
    torch.testing.assert_close(pool(x, lambda m: m.amax(dim=(2, 3))), maximum)
    pooled = torch.randn(4, 6)
    assert pool(pooled, "avg") is pooled


@pytest.mark.parametrize(
    ("shape", "pooling", "words"),
    [
        ((4, 6), "avg+max", "pooled already"),
        ((4, 6, 3), "avg", r"\(4, 6, 3\)"),
        ((6,), "avg", r"\(6,\)"),
        ((4, 6, 3, 3), lambda m: m, r"must return a tensor of shape \(B, F\)"),
        ((4, 6, 3, 3), lambda m: None, "NoneType"),
    ],
)
def test_shapes_that_cannot_be_pooled(shape, pooling, words):
    with pytest.raises(BatchError, match=words):
        pool(torch.randn(shape), pooling)


# --- widths -----------------------------------------------------------------------------------


class Custom(nn.Module):
    """An embedder as people write it, whose first layer in order of registration has a width."""

    def __init__(self, first):
        super().__init__()
        self.drop = nn.Dropout()
        self.first = first
        self.last = nn.Linear(9, 6)
        self.scale = nn.Parameter(torch.ones(1))


class OwnNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


LINEAR = nn.Linear(12, 6)
WIDTHS = {
    "linear": (LINEAR, 12),
    "batch norm": (nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 6)), 7),
    "batch norm without weights": (nn.Sequential(nn.BatchNorm1d(7, affine=False), LINEAR), 7),
    "synchronised": (nn.Sequential(nn.SyncBatchNorm(7), LINEAR), 7),
    "layer norm": (nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 6)), 7),
    "layer norm without weights": (nn.LayerNorm((7,), elementwise_affine=False), 7),
    "layer norm of a map": (nn.Sequential(nn.LayerNorm((3, 2, 2)), nn.Flatten(), LINEAR), None),
    "custom": (Custom(LINEAR), 12),
    "custom nested": (nn.Sequential(nn.ReLU(), Custom(nn.Sequential(nn.BatchNorm1d(7)))), 7),
    "flattened": (nn.Sequential(nn.Flatten(), LINEAR), 12),
    "parallel": (nn.DataParallel(nn.Sequential(LINEAR)), 12),
    "lazy": (nn.Sequential(nn.LazyLinear(6), LINEAR), None),
    "lazy norm": (nn.Sequential(nn.LazyBatchNorm1d(), LINEAR), None),
    "convolution": (nn.Sequential(nn.Conv2d(3, 12, 1), nn.Flatten(), LINEAR), None),
    "own norm": (nn.Sequential(OwnNorm(12), LINEAR), None),
    "embedding": (nn.Sequential(nn.Embedding(100, 12), LINEAR), None),
    "no layer": (nn.Identity(), None),
}


@pytest.mark.parametrize("case", WIDTHS)
def test_the_input_width_is_that_of_the_first_layer(case):
    module, width = WIDTHS[case]
    assert input_width(module) == width
    if width:
        assert S2SDLoss(losses.NTXentLoss(), embedder=module, head_dims=(8,)).feature_dim == width


def test_widths_of_wrapped_linear_layers():
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(12, 6))
    for module in (weight_norm, torch.compile(nn.Linear(12, 6)), nn.DataParallel(LINEAR)):
        assert (input_width(module), output_width(module), is_linear(module)) == (12, 6, True)
    assert output_width(nn.Sequential(LINEAR, nn.BatchNorm1d(6))) == 6
    assert output_width(nn.Conv2d(3, 4, 1)) is None
    assert not is_linear(nn.Sequential(LINEAR, nn.ReLU()))


def test_widths_of_layers_with_lora():
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.fc = nn.Conv2d(3, 12, 1), nn.Linear(12, 6)
            self.words = nn.Embedding(100, 12)

        def forward(self, x):
            return self.fc(self.trunk(x).mean((2, 3)))

    config = peft.LoraConfig(r=2, target_modules=["fc", "trunk", "words"])
    model = peft.get_peft_model(Net(), config)
    net = model.base_model.model
    assert (input_width(net.fc), output_width(net.fc), is_linear(net.fc)) == (12, 6, True)
    assert input_width(net.trunk) is None
    assert input_width(net.words) is None  # its in_features are words
    loss_func = S2SDLoss(lambda d: losses.ArcFaceLoss(4, d), embedder=net.fc, head_dims=(8,))
    assert (loss_func.feature_dim, loss_func.loss.W.shape) == (12, (6, 4))
    loss_func(model(torch.randn(8, 3, 2, 2)), torch.arange(8) // 2).backward()
    config = peft.LoraConfig(target_modules=["words"], modules_to_save=["fc"])
    saved = peft.get_peft_model(Net(), config)
    assert input_width(saved.base_model.model.fc) == 12
