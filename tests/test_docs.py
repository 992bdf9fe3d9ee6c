"""README and docs: Python blocks run, links lead somewhere, every public name is there."""

import re
from pathlib import Path

import pytest
from pml import loss_names, miner_names
from snippets import run

import s2sd_pml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = set(
    "README.md index.md adopt.md authors-code.md faq.md features.md how-it-works.md optimizer.md "
    "supported.md works-with.md".split()
)


@pytest.mark.filterwarnings("default::s2sd_pml.errors.OptimizerWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = run(page)
    assert blocks or page.name not in WITH_CODE


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_and_images_exist(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_the_api_page_names_everything_public():
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in s2sd_pml.__all__:
        assert re.search(rf"s2sd_pml\.{name}\b", api), name


def test_the_tests_that_the_docs_name_exist():
    text = (ROOT / "docs" / "works-with.md").read_text(encoding="utf-8")
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_the_page_of_losses_and_miners_names_every_one_of_pml():
    named = set(re.findall(r"\w+", (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")))
    for name in [*loss_names(), *miner_names()]:
        assert named & {name, name.removesuffix("Loss"), name.removesuffix("Miner")}, name


def test_the_version_is_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{s2sd_pml.__version__}]" in changelog
