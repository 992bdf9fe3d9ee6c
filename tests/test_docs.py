"""README and docs: code runs, links lead somewhere, tables are generated, language and layout."""

import re
import shlex
import string
import sys
from pathlib import Path

import pytest
import train
from pml import loss_names, miner_names
from snippets import run
from study import ceiling, compare
from trainer import config, icons, image_sets, options
from trees import cub200, folder

import s2sd_pml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import draw_results  # noqa: E402
import tables  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = set(
    "README.md adopt.md authors-code.md beyond.md deploy.md faq.md features.md how-it-works.md "
    "optimizer.md quickstart.md settings.md study.md supported.md works-with.md".split()
)


@pytest.mark.filterwarnings("default::s2sd_pml.errors.OptimizerWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = run(page)
    assert blocks or page.name not in WITH_CODE


PROGRAMS = "train|compare|diagnose|ceiling"
OWN_FLAGS = {"ceiling": ceiling, "compare": compare}


def commands(page):
    """What the page's bash blocks do with the example programs: the file and its flags."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in re.findall(r"\b([A-Z])=(\"[^\"]*\"|[^\s;]+)", line):
                variables[name] = value.strip('"')
            if found := re.search(rf"examples/(?:study/)?({PROGRAMS})\.py(?: (.*))?$", line):
                flags = string.Template(found[2] or "").substitute(variables)
                yield found[1], shlex.split(flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_understood(page, tmp_path, capsys):
    """With a miniature tree in the place of DIR they get as far as their data's counts.

    The other programs hand on to train.py the flags that they do not know.
    """
    cub200(tmp_path / "cub200")
    folder(tmp_path / "folder")
    for program, flags in commands(page):
        if program in OWN_FLAGS:
            _, flags = OWN_FLAGS[program].parser().parse_known_args(flags)
        if "--recipe" in flags and image_sets.datasets is None:
            continue  # PML reads CUB from version 2.9 on
        published = "--recipe" in flags and "folder" not in flags
        root = tmp_path / ("cub200" if published else "folder")
        first = str(ROOT / "examples/study/first.yaml")
        here = {"DIR": str(root), "photos": str(root), "examples/study/first.yaml": first}
        here |= dict.fromkeys(("icons-242.npz", "icons-685.npz"), str(icons.PATH))
        flags = [here.get(flag, flag) for flag in flags]
        args = options.parse(options.parser(), [*flags, "--output", str(tmp_path / "out")])
        if args.root or args.dataset == "icons400":
            small = "--backbone cnn --batch-size 4 --per-class 2 --validation-share 0.4"
            train.main([*flags, "--dry-run", *small.split()])
            assert "| train |" in capsys.readouterr().out


def test_the_file_of_settings_of_the_docs_is_understood(tmp_path):
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    args = options.parse(options.parser(), ["--config", str(tmp_path / "mine.yaml")])
    assert (args.dataset, args.batch_size, args.loss_args["beta"]) == ("folder", 112, 40)


def test_every_flag_that_the_trainers_page_names_is_one():
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    known = options.parser()._option_string_actions
    for flag in set(re.findall(r"`(--[a-z-]+)", page)) - {"--help", "--logdir"}:
        assert flag in known, flag
    for recipe in re.findall(r"`((?:cub|cars|sop|emoji)-\w+-\w+(?:-\w+)?)`", page):
        assert recipe in config.names(), recipe


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
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_the_page_of_losses_and_miners_names_every_one_of_pml():
    named = set(re.findall(r"\w+", (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")))
    for name in [*loss_names(), *miner_names()]:
        assert named & {name, name.removesuffix("Loss"), name.removesuffix("Miner")}, name


def test_the_version_is_in_the_changelog_and_the_citation():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{s2sd_pml.__version__}]" in changelog
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {s2sd_pml.__version__}\n" in citation


def test_the_tables_are_those_of_the_result_files():
    """`python docs/tables.py` writes them."""
    for path, text in tables.generated().items():
        assert path.read_text(encoding="utf-8") == text, path


TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def lines(page):
    """Every line of a page with its number, and whether it is code."""
    code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = bool(re.match(r" *```", line))
        code ^= fence
        yield number, line, code and not fence


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.name)
def test_snippets_and_prose_have_their_width(page):
    """76 columns of code, 120 of prose; rows of tables and pictures cannot be broken."""
    for number, line, code in lines(page):
        if code or not re.match(r" *(\||!\[)", line):
            assert len(line) <= (76 if code else 120), f"{page.name}:{number}: {line}"
            assert code or not re.match(r" *\d\d+\. ", line), f"{page.name}:{number}: no list"


LONG = {"study.md", "api.md", "changelog.md"}  # the appendix and what is looked up


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_is_read_in_a_few_minutes(page):
    text = page.read_text(encoding="utf-8")
    assert page.name in LONG or len(text.split()) <= 1600
    assert page.name != "README.md" or text.count("\n") <= 170


# What only this project said; the field has other words. Names of flags and files are code.
REPLACED = (
    r"\bmends?\b|\btold\b|values seen|fitted anew|\brefit\b|do(es)? not teach|nested losses|"
    r"two stages|\bbeside\b|one's own|house rules|of the house|per cent|what is open|trained along"
)


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.name)
def test_the_pages_use_the_words_of_the_field(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```$|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(f".*(?:{REPLACED}).*", prose, re.IGNORECASE)
    assert not found, page.name


def test_every_page_and_picture_is_used():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in navigation, page.name
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (ROOT / "docs" / "images").iterdir():
        assert f"images/{picture.name})" in text, picture.name


def test_the_figures_of_the_results_are_drawn(tmp_path, monkeypatch):
    """`python docs/draw_results.py` draws them."""
    monkeypatch.setattr(draw_results, "IMAGES", tmp_path)
    draw_results.draw()
    drawn = {picture.name for picture in tmp_path.iterdir()}
    kept = {picture.name for picture in (ROOT / "docs" / "images").iterdir()}
    assert kept - drawn == {"how-it-works.png", "performance.png"}
    assert drawn <= kept
