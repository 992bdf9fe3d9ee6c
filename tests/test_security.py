"""What SECURITY.md promises of every source file."""

import ast
from pathlib import Path

import pytest
import torch

from s2sd_pml import S2SDLoss

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("s2sd_pml", "examples", "tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Round trips of what the test itself pickled.
MAY_PICKLE = {
    f"tests/test_{name}.py"
    for name in "capture counter loss matryoshka optimizer recipes teachers wrapper".split()
}


def unsafe(source: str) -> list[str]:
    """Calls that load pickles, and imports of what does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append(ast.unparse(node))
            if given.get("allow_pickle", "False") != "False":
                found.append(ast.unparse(node))
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES:
            found.append(node.module)
    return found


def test_no_source_loads_pickles():
    assert len(SOURCES) > 60
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name not in MAY_PICKLE:
            assert unsafe(path.read_text(encoding="utf-8")) == [], name


@pytest.mark.parametrize(
    "source",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
     "import pickle as p", "from joblib import load"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source):
    assert unsafe(source)


def test_a_state_dict_needs_nothing_but_tensors(tmp_path):
    loss_func = S2SDLoss(torch.nn.Identity(), feature_dim=4, head_dims=(5,))
    torch.save(loss_func.state_dict(), tmp_path / "state.pt")
    loss_func.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
