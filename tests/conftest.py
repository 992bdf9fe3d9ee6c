"""Fixtures of the whole suite: fixed seeds and few threads, on the CPU unless asked otherwise."""

import os
import re

import pytest
import torch


def pytest_configure(config):
    """Hide GPUs, that every machine runs the same; ``pytest -m cuda`` is what tests them."""
    if not re.search(r"(?<!not )\bcuda\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)
