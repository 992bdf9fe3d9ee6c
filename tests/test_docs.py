"""README and docs: Python blocks run, links lead somewhere, every public name is there."""

import csv
import re
import shlex
from pathlib import Path

import pytest
from pml import loss_names, miner_names
from snippets import run
from test_examples import SMALL  # noqa: F401 - puts the examples on the path
from trees import cub200, folder

import ceiling  # isort: skip
import compare  # isort: skip
import config  # isort: skip
import image_sets  # isort: skip
import options  # isort: skip
import train  # isort: skip

import s2sd_pml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = set(
    "README.md index.md adopt.md authors-code.md does-it-help.md faq.md features.md "
    "how-it-works.md optimizer.md settings.md supported.md works-with.md".split()
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
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(rf"examples/({PROGRAMS})\.py(?: (.*))?$", line):
                yield found[1], shlex.split(found[2] or "")


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
        root = tmp_path / ("cub200" if "--recipe" in flags else "folder")
        flags = [{"DIR": str(root), "photos": str(root)}.get(flag, flag) for flag in flags]
        args = options.parse(options.parser(), [*flags, "--output", str(tmp_path / "out")])
        if args.root or args.dataset == "icons400":
            train.main([*flags, "--dry-run", "--backbone", "cnn", "--batch-size", "4",
                        "--per-class", "2"])  # fmt: skip
            assert "| train |" in capsys.readouterr().out


def test_the_file_of_settings_of_the_docs_is_understood(tmp_path):
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    args = options.parse(options.parser(), ["--config", str(tmp_path / "mine.yaml")])
    assert (args.dataset, args.batch_size, args.loss_args["beta"]) == ("folder", 112, 40)


def test_every_flag_that_the_trainers_page_names_is_one():
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    known = options.parser().format_help()
    for flag in set(re.findall(r"`(--[a-z-]+)", page)) - {"--help", "--logdir"}:
        assert re.search(rf"{flag}\b", known), flag
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


PCA = "base 512 + PCA"


def recalls(name):
    """Recall@1 in per cent by method, size and seed."""
    with open(ROOT / "docs" / "results" / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(r["method"], int(r["size"]), r["seed"]): 100 * float(r["Recall@1"]) for r in rows}


def told(one, other, sign=""):
    """Mean and interval of the difference at the same five seeds, as the page writes it."""
    (rows, *key), (others, *of) = one, other
    seeds = "01234"
    mean, half = compare.interval(rows[(*key, s)] - others[(*of, s)] for s in seeds)
    return f"{mean:{sign}.1f} ± {half:.1f}"


def test_the_differences_between_trunks_are_those_of_the_rows():
    page = (ROOT / "docs" / "does-it-help.md").read_text(encoding="utf-8")
    along, heads, base = map(recalls, ("emoji", "ceiling-emoji", "ceiling-emoji-base"))
    page = page.replace("\n  ", " ")
    usual, new = "MSDF, small-data", "MSDF, small-data, refit"
    two_layers, two_layers_new = "MSDF, two layers", "MSDF, two layers, refit"
    for size in (16, 32, 64, 128):
        fitted = (heads, "base + KL", size)
        assert f"{told(fitted, (base, 'base', size))} at {size}" in page
        assert f"{told(fitted, (along, 'base', size), '+')} at {size}" in page
        for method in (fitted, (along, usual, size), (along, new, size)):
            assert told(method, (along, PCA, size)) in page
        assert f"{told((along, new, size), (along, 'base', size))} at {size}" in page
    for one, other in [
        ((heads, "base + KL", 32), (along, "base", 128)),
        ((along, new, 32), (along, "base", 128)),
        ((along, new, 32), (along, "base", 64)),
        ((along, new, 64), (along, "base", 128)),
    ]:
        assert f"{told(one, other)} above" in page
    assert f"{told((along, new, 32), (base, 'base', 32))} at 32" in page
    assert f"{told((along, new, 64), (along, 'base, refit', 64))} at 64" in page
    better = told((along, two_layers_new, 32), (heads, "base + KL", 32))
    assert f"{better} better still at 32" in page
    assert f"{told((base, 'base', 32), (along, 'base', 32))} points at 32" in page

    two = recalls("emoji-two-per-class")
    for method in ("base", two_layers):
        assert told((along, method, 32), (two, method, 32)) in page
    assert f"{told((two, two_layers_new, 32), (two, 'base, refit', 32))}." in page
    gained = {
        (number, s): rows[two_layers, 32, s] - rows["base", 32, s]
        for number, rows in (("two", two), ("four", along))
        for s in "01234"
    }
    assert f"{told((gained, 'two'), (gained, 'four'))} more than with four" in page
    for heads, method in (("linear heads, no KL", usual), ("heads, no KL", two_layers)):
        assert f"{told((along, method, 32), (along, heads, 32))} more" in page


def test_the_differences_between_methods_are_those_of_the_rows():
    page = (ROOT / "docs" / "does-it-help.md").read_text(encoding="utf-8")
    page = page.replace("\n  ", " ")
    emoji, icons, msdfa, gpu = map(recalls, ("emoji", "icons-400", "icons-400-msdfa", "emoji-gpu"))
    recipe, own, two = "MSDF, small-data", "MSDFA, small-data", "MSDF, two layers"
    four, large, every = (8, 16, 32, 64), (16, 32, 64, 128), (8, 16, 32, 64, 128)
    taught, untaught = "MSDFA, two layers", "MSDFA, two layers, no KL"
    for parts in (
        [told((msdfa, taught, s), (msdfa, untaught, s)) for s in (16, 32, 64)],
        [told((icons, own, s), (icons, PCA, s)) for s in four],
        [told((icons, recipe, s), (icons, PCA, s)) for s in four],
        [told((icons, own, s), (icons, "base", 2 * s), "+") for s in four],
        [told((icons, recipe, s), (icons, two, s), "+") for s in every],
        [told((emoji, recipe, s), (emoji, two, s), "+") for s in large],
        [told((emoji, recipe, s), (emoji, "nested", s)) for s in large],
    ):
        assert f"{', '.join(parts[:-1])} and {parts[-1]}" in page
    copies = recalls("ceiling-icons-400-msdfa")
    for method in ("heads", "KL, tested images"):
        parts = [told((copies, method, s), (copies, "base", s)) for s in (16, 32, 64)]
        assert f"{', '.join(parts[:-1])} and {parts[-1]}" in page
    stages = told((emoji, recipe, 32), (emoji, "two stages", 32))
    assert f"the recipe is {stages} above them" in page
    adds = [told((gpu, f"{recipe}, refit", s), (gpu, "base, refit", s)) for s in (16, 32)]
    assert f"S2SD adds {adds[0]} at 16 and {adds[1]} at 32 to it" in page


def test_the_gains_that_the_readme_tells_are_those_of_the_rows():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")
    emoji, icons = recalls("emoji"), recalls("icons-400")
    for rows, method in [
        (emoji, "MSDF, small-data"),
        (emoji, "MSDF, small-data, refit"),
        (icons, "MSDF, small-data"),
        (icons, "MSDFA, small-data"),
    ]:
        sizes = sorted({size for name, size, _ in rows if name == method})
        cells = [told((rows, method, size), (rows, "base", size), "+") for size in sizes]
        assert f"| {' | '.join(cells)} |" in readme
