"""Fixtures of the whole suite: fixed seeds and few threads, on the CPU unless asked otherwise."""

import os

import pytest
import torch


def pytest_configure(config):
    """Hide GPUs, that every machine runs the same; ``pytest -m cuda`` is what tests them."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)
