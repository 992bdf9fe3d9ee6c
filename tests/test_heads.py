"""Projection head and pooling against the definitions written out."""

import pytest
import torch

from s2sd_pml import ProjectionHead
from s2sd_pml.errors import BatchError
from s2sd_pml.heads import pool


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
