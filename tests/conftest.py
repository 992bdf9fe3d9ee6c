"""Fixtures of the whole suite: fixed seeds, few threads, an empty folder to work in, no GPU."""

import os
import re

import pytest
import torch


def pytest_configure(config):
    """Hide GPUs, that every machine runs the same; ``pytest -m cuda`` is what tests them."""
    if not re.search(r"(?<!not )\bcuda\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# The compiler of torch 2.1 takes the hooks off optimizers of classes that were not used before it.
for _kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
    _kind([torch.zeros(1, requires_grad=True)], lr=0.1)
for _kind in (torch.optim.RMSprop, torch.optim.LBFGS):
    _kind([torch.zeros(1, requires_grad=True)])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _empty_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("working-folder")


@pytest.fixture(autouse=True)
def _elsewhere(_empty_folder, monkeypatch):
    """Tests work in an empty folder, and leave nothing there: none sees what another run left."""
    monkeypatch.chdir(_empty_folder)
    yield
    left = list(_empty_folder.iterdir())
    assert not left, f"written into the working folder: {left}"
