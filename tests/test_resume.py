"""A run killed at any moment and resumed ends as the uninterrupted one, bit for bit on the CPU."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import train
from helpers import D, Model, images, labels
from pytorch_metric_learning import losses
from trainer import checkpoint, export, icons
from trainer.evaluate import apply

from s2sd_pml import S2SDLoss

ROOT = Path(__file__).parents[1]

FLAGS = (
    "--epochs 2 --steps-per-epoch 3 --batch-size 16 --dims 24 32 --threads 1 "
    "--feature-distill-delay 2 --loss ProxyAnchorLoss --miner none --checkpoint-every 1 "
    "--quiet --no-report"
).split()
STEPS = 6

# ---- the example trainer

# Kills itself in the N-th write of a checkpoint: before it, in the middle of it, between writing
# and renaming, or after it.
KILL = """
import os, signal, sys
import torch, train
from trainer import checkpoint
moment, writes = sys.argv.pop(1), int(sys.argv.pop(1))
count = 0
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def at(name, original):
    def call(*args, **kwargs):
        global count
        count += name == "before"
        if moment == name and count == writes:
            if name == "middle":
                args[1].write(b"PK half a checkpoint")
                args[1].flush()
            die()
        return original(*args, **kwargs)
    return call
write = checkpoint.write
def whole(*args):
    at("before", lambda: None)()
    write(*args)
    at("after", lambda: None)()
checkpoint.write = whole
torch.save = at("middle", torch.save)
os.replace = at("rename", os.replace)
train.main()
"""


def main(folder, *flags):
    train.main([*FLAGS, "--output", str(folder), *flags])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    main(folder)
    return folder


def last(folder, run="S2SD"):
    content = checkpoint.read(checkpoint.files(folder / "checkpoints", run)[-1], checkpoint.KIND)
    history = content["states"]["run"].pop("history")
    content["states"]["run"] |= {"history": [row[:-1] for row in history], "seconds": 0}
    return content


def assert_same(a, b, where=""):
    """Equal to the bit, whatever the nesting."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("moment", "write"),
    [
        ("middle", 9),
        pytest.param("after", 2, marks=pytest.mark.slow),
        pytest.param("rename", STEPS + 2, marks=pytest.mark.slow),
        pytest.param("before", 11, marks=pytest.mark.slow),
    ],
)
def test_the_trainer_killed_and_resumed(uninterrupted, tmp_path, moment, write):
    command = [sys.executable, "-c", KILL, moment, str(write), *FLAGS, "--output", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "metrics.csv").exists()
    main(tmp_path, "--resume")
    for run in ("base", "S2SD"):
        assert_same(last(tmp_path, run), last(uninterrupted, run))
    assert metrics(tmp_path) == metrics(uninterrupted)


def stopped(uninterrupted, tmp_path):
    """A folder as after a kill: the last two checkpoints of each run."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for file in checkpoint.files(uninterrupted / "checkpoints"):
        (folder / file.name).write_bytes(file.read_bytes())
    return checkpoint.files(folder, "S2SD")


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))


def foreign(file):
    torch.save({"state_dict": {}}, file)


def empty(file):
    file.write_bytes(b"")


def slow(damage):
    return pytest.param(damage, marks=pytest.mark.slow)


def code(file):
    torch.save({"kind": checkpoint.KIND, "states": os.path.join}, file)


@pytest.mark.parametrize("damage", [cut, code, slow(flip), slow(foreign), slow(empty)])
def test_a_damaged_or_foreign_file_is_named_and_the_one_before_it_used(
    uninterrupted, tmp_path, damage
):
    before, newest = stopped(uninterrupted, tmp_path)
    damage(newest)
    with pytest.warns(UserWarning, match=re.escape(f"{newest} cannot be used: ")):
        main(tmp_path, "--resume")
    assert_same(last(tmp_path), last(uninterrupted))
    assert before.name < newest.name


def test_later_checkpoints_of_an_abandoned_run_do_not_count_as_kept(tmp_path):
    kept = []
    for step in (50, 100, 60, 90):
        checkpoint.save(tmp_path, "base", step, {}, {"model": torch.nn.Linear(1, 1)})
        kept.append([int(f.stem[-8:]) for f in checkpoint.files(tmp_path)])
    assert kept == [[50], [50, 100], [50, 60], [60, 90]]


def refused(capsys, folder, *flags):
    with pytest.raises(SystemExit):
        main(folder, *flags)
    return capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*cannot be used")
def test_what_cannot_be_resumed_is_refused_before_training(uninterrupted, tmp_path, capsys):
    before, newest = stopped(uninterrupted, tmp_path)
    assert "add --resume, or use another --output" in refused(capsys, tmp_path)
    message = refused(capsys, tmp_path, "--resume", "--distill-weight", "3")
    assert "distill_weight was 30.0 and is 3.0" in message
    for file in (before, newest):
        cut(file)
    message = refused(capsys, tmp_path, "--resume")
    assert "None of" in message
    assert before.name in message


def test_resuming_an_empty_folder_starts_anew(uninterrupted, tmp_path):
    main(tmp_path, "--resume")
    assert metrics(tmp_path) == metrics(uninterrupted)
    assert len(checkpoint.files(tmp_path / "checkpoints")) == 4  # the last two of each run
    assert {file.suffix for file in (tmp_path / "checkpoints").iterdir()} == {".pt"}


def test_the_exported_model_is_the_trained_one_without_heads(uninterrupted, tmp_path, capsys):
    stopped(uninterrupted, tmp_path)
    main(tmp_path, "--resume", "--export", str(tmp_path / "out" / "model.pt"))
    assert "loaded back and compared" in capsys.readouterr().out
    model = export.load(tmp_path / "out" / "model.pt")
    trained = last(tmp_path)["states"]["model"]
    assert_same(dict(model.state_dict()), dict(trained))
    content = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert set(content) == {"kind", "description", "state_dict"}
    assert apply(model, icons.load().images[:5]).shape == (5, model.embedding_size)
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.pt cannot be used: it is no"):
        checkpoint.read(tmp_path / "out" / "model.pt", checkpoint.KIND)


# ---- a custom loop, with nothing but PyTorch and os.replace


def loop(path, steps, die_at=None, loss=None):
    torch.manual_seed(1)
    model = Model()
    loss_func = S2SDLoss(
        loss or losses.ProxyAnchorLoss(6, D), embedder=model.embedder, head_dims=(8, 9),
        feature_distill_delay=3,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss_func.add_to(optimizer, loss_lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=2)
    memories = [m for m in loss_func.modules() if isinstance(m, losses.CrossBatchMemory)]
    parts = [model, loss_func, optimizer, scheduler, scaler]
    torch.manual_seed(2)
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        for memory, (place, full) in zip(memories, saved["memories"], strict=True):
            memory.queue_idx, memory.has_been_filled = place, full
        torch.set_rng_state(saved["random"])
        start = saved["step"]
    for step in range(start, steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss_func(model(images(12)), labels(12, 2))
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        state = {
            "parts": [part.state_dict() for part in parts],
            "memories": [(m.queue_idx, m.has_been_filled) for m in memories],
            "random": torch.get_rng_state(),
            "step": step + 1,
        }
        torch.save(state, path.with_suffix(".part"))
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace(path.with_suffix(".part"), path)
    return torch.load(path, weights_only=True)


def memory():
    return losses.CrossBatchMemory(losses.NTXentLoss(), D, memory_size=20)


def killed(path, make):
    torch.set_num_threads(1)
    loop(path, 6, die_at=4, loss=make and make())


@pytest.mark.skipif(torch.__version__ < "2.4", reason="no GradScaler or float16 for the CPU before")
@pytest.mark.parametrize(
    "make", [None, pytest.param(memory, marks=pytest.mark.slow)], ids=["proxies", "memory"]
)
def test_a_custom_loop_killed_while_it_saves_and_resumed(tmp_path, make):
    whole = loop(tmp_path / "whole.pt", 6, loss=make and make())
    process = mp.get_context("spawn").Process(target=killed, args=(tmp_path / "cut.pt", make))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 4
    assert_same(loop(tmp_path / "cut.pt", 6, loss=make and make()), whole)
    assert whole["parts"][1]["counter._extra_state"] == 6
