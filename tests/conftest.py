"""Fixtures of the whole suite: fixed seeds, few threads, an empty folder to work in, no GPU."""

import os
import re

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def pytest_configure(config):
    """Hide GPUs, that every machine runs the same; ``pytest -m cuda`` is what tests them."""
    if not re.search(r"(?<!not )\bcuda\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


HOOKED = (  # by optimizers' hooks
    "test_evaluation.py",
    "test_restored.py",
    "test_optimizer.py",
    "test_matryoshka_training.py",
)


def pytest_collection_modifyitems(items):
    """First what needs optimizers' hooks: torch 2.1 takes them off at the first compilation."""
    if torch.__version__ < "2.4":
        items.sort(key=lambda i: HOOKED.index(i.path.name) if i.path.name in HOOKED else 9)


@pytest.fixture(autouse=True)
def _optimizers_call_hooks(request):
    if torch.__version__ < "2.4" and request.node.path.name in HOOKED:
        seen = []
        handle = register_optimizer_step_post_hook(lambda *_: seen.append(True))
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()
        handle.remove()
        if not seen:
            pytest.skip("torch.compile has taken the hooks off the optimizers")


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
