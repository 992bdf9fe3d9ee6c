"""What the trainer's flags do: precision, averages, schedules, early ends, settings from files."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys

import pytest
import torch
import train
import yaml
from test_examples import FILES, SMALL, TORCHRUN, command, final, read
from test_resume import assert_same, metrics
from trainer import (
    by_name,
    checkpoint,
    config,
    export,
    image_sets,
    images,
    network,
    objectives,
    optim,
    options,
    ranks,
    report,
    stop,
    training,
)
from trees import cub200, folder

from s2sd_pml import S2SDLoss


def main(tmp_path, *flags):
    train.main([*SMALL, "--quiet", "--no-report", "--output", str(tmp_path), *map(str, flags)])
    return read(tmp_path)


def parsed(*flags):
    args = options.parse(options.parser(), list(map(str, flags)))
    args.steps_per_epoch = args.steps_per_epoch or 10
    return args


def parameters(content, part="model"):
    return content["states"][part]


# ---- how the parameters move


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision_trains(tmp_path, amp):
    if amp == "fp16" and not hasattr(torch.amp, "GradScaler"):
        pytest.skip("no GradScaler for the CPU in this PyTorch")
    # float16 is slow on a CPU
    flags = "--batch-size 8 --feature-distill-delay 0 --loss ProxyAnchorLoss --miner none".split()
    rows = main(tmp_path, *flags, "--amp", amp, "--checkpoint-every", 3)
    plain = main(tmp_path / "plain", *flags)
    near = {"bf16": 0.02, "fp16": 0.2}[amp]  # a scaler passes over steps until it has its scale
    for who in ("base", "S2SD"):
        assert final(rows, who)["loss"] == pytest.approx(final(plain, who)["loss"], rel=near)
        assert final(rows, who)["loss"] != final(plain, who)["loss"]
    content = checkpoint.read(checkpoint.files(tmp_path / "checkpoints")[-1], checkpoint.KIND)
    assert bool(content["states"]["stepper"]) == (amp == "fp16")  # the scale is kept
    assert {p.dtype for p in parameters(content).values()} == {torch.float32, torch.int64}


class EndedError(Exception):
    pass


def test_accumulated_gradients_are_the_mean_of_the_batches(tmp_path, monkeypatch):
    gradients = []

    def step(self):
        gradients.append([p.grad.clone() for p in self.model.parameters()])
        raise EndedError

    monkeypatch.setattr(optim.Stepper, "step", step)
    for accumulate, steps in ((1, 4), (2, 2)):
        with pytest.raises(EndedError):
            main(tmp_path / str(accumulate), "--baseline-only", "--freeze-bn",
                 "--accumulate", accumulate, "--steps-per-epoch", steps)  # fmt: skip
    first, both = gradients
    between = images.Batches.between
    monkeypatch.setattr(images.Batches, "between", lambda self, _, stop: between(self, 1, stop))
    with pytest.raises(EndedError):  # the second batch alone
        main(tmp_path / "second", "--baseline-only", "--freeze-bn", "--steps-per-epoch", 4)
    for a, b, mean in zip(first, gradients[-1], both, strict=True):
        torch.testing.assert_close((a + b) / 2, mean, rtol=1e-4, atol=1e-7)


def test_the_gradient_is_clipped(tmp_path, monkeypatch):
    norms = []
    step = torch.optim.Adam.step

    def watched(self, *args):
        own = [p.grad for group in self.param_groups[:2] for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in own]).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    main(tmp_path / "a")
    assert min(norms) > 1e-3
    norms.clear()
    main(tmp_path / "b", "--clip-grad", 1e-3)
    assert norms == pytest.approx([1e-3] * 6, rel=1e-3)


def test_the_tested_and_exported_model_is_the_moving_average(tmp_path):
    main(tmp_path, "--ema", 0.7, "--checkpoint-every", 1, "--export", tmp_path / "model.pt")
    before, last = (
        checkpoint.read(path, checkpoint.KIND)
        for path in checkpoint.files(tmp_path / "checkpoints", "S2SD")
    )
    averaged = {k.removeprefix("module."): v for k, v in parameters(last, "average").items()}
    for name, value in parameters(last).items():
        if value.is_floating_point():
            old = parameters(before, "average")[f"module.{name}"]
            torch.testing.assert_close(averaged[name], 0.7 * old + 0.3 * value)
    exported = export.load(tmp_path / "model.pt").state_dict()
    assert_same(dict(exported), {name: averaged[name] for name in exported})


@pytest.mark.parametrize("variant", ["msdf", pytest.param("msdfa", marks=pytest.mark.slow)])
def test_the_compiled_trunk_gives_the_same_numbers(tmp_path, monkeypatch, variant):
    calls = []
    original = torch.compile

    def compiled(function):  # captured as ever, and run without a C++ compiler
        calls.append(function)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compiled)
    flags = ["--variant", variant, "--feature-distill-delay", 0]
    plain = main(tmp_path / "plain", *flags)
    fast = main(tmp_path / "compiled", *flags, "--compile")
    assert len(calls) == 2
    for who in ("base", "S2SD"):
        assert final(fast, who)["loss"] == pytest.approx(final(plain, who)["loss"], rel=1e-4)


def test_what_was_trained_in_another_layout_is_exported_all_the_same(tmp_path):
    main(tmp_path, "--no-channels-last", "--export", tmp_path / "model.pt")
    assert export.load(tmp_path / "model.pt").embedding_size == 16


def test_an_exported_file_that_holds_another_model_is_refused(tmp_path, monkeypatch):
    model, load = network.Network(4).eval(), export.load

    def another(path):
        loaded = load(path)
        with torch.no_grad():
            loaded.embedder.bias += 1e-6
        return loaded

    export.write(model, tmp_path / "model.pt", torch.rand(8, 1, 32, 32))
    monkeypatch.setattr(export, "load", another)
    with pytest.raises(RuntimeError, match="loaded back, makes other embeddings"):
        export.write(model, tmp_path / "model.pt", torch.rand(8, 1, 32, 32))


def test_the_delay_of_features_counts_steps_whatever_is_accumulated(tmp_path):
    flags = ["--s2sd-only", "--epochs", 3, "--steps-per-epoch", 1, "--feature-distill-delay", 2]
    for accumulate in (1, 2):
        rows = main(tmp_path / str(accumulate), *flags, "--accumulate", accumulate)
        terms = [float(r["value"]) for r in rows if r["metric"] == "feature_distill"]
        assert [term != 0 for term in terms] == [False, False, True]


def test_the_heads_of_an_average_are_scored_on_the_trunk_they_were_trained_on(tmp_path):
    flags = ["--s2sd-only", "--seed", 1]
    plain = main(tmp_path / "a", *flags)
    averaged = main(tmp_path / "b", *flags, "--ema", 0.99)
    assert final(plain, "head 24") == final(averaged, "head 24")
    assert final(plain, "S2SD")["MAP@R"] != final(averaged, "S2SD")["MAP@R"]


def test_batch_norm_over_ranks_takes_half_precision(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "_sum", lambda x: x)
    own, plain = ranks.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(own(x), plain(x))
    half = own(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain(x), atol=0.05, rtol=0.05)


def test_heads_are_of_one_layer_where_that_is_asked_for(tmp_path):
    for flag, layers in (("--linear-heads", 1), ("--no-linear-heads", 2)):
        args = parsed(flag, "--dims", 24, 32)
        loss_func, _ = objectives.s2sd_loss(args, network.Network(4), 3)
        found = [m for m in loss_func.modules() if isinstance(m, torch.nn.Linear)]
        assert len(found) == 2 * layers


def rates(*flags, steps=8):
    args = parsed("--lr", 1, "--embedder-lr", 5, "--steps-per-epoch", 2, *flags)
    model = network.Network(4)
    optimizer = optim.make_optimizer(args, model, by_name.pml_loss(args, 3)[0])
    schedule = optim.make_schedule(args, optimizer, steps)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_by_hand():
    assert rates("--schedule", "constant") == [[1, 5]] * 8
    stepwise = rates("--schedule", "multistep", "--milestones", 1, 3, "--lr-gamma", 0.1)
    assert [r[0] for r in stepwise] == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates("--schedule", "cosine", "--warmup", 3)
    assert [r[0] for r in cosine[:4]] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert [r[0] for r in cosine[3:]] == pytest.approx(
        [1, 0.9045, 0.6545, 0.3455, 0.0955], abs=1e-4
    )
    assert [r[1] for r in cosine] == pytest.approx([5 * r[0] for r in cosine])


def test_frozen_batch_norm_keeps_its_statistics_and_learns_its_scale(tmp_path):
    main(tmp_path, "--freeze-bn", "--s2sd-only", "--checkpoint-every", 3)
    content = checkpoint.read(checkpoint.files(tmp_path / "checkpoints")[-1], checkpoint.KIND)
    found = parameters(content)
    means = [v for name, v in found.items() if "running_mean" in name]
    assert len(means) == 4
    assert all(not mean.any() for mean in means)
    checkpoint.seed(0)
    start = network.Network(16).state_dict()
    scales = [name for name in found if re.fullmatch(r"trunk\.body\.\d\.2\.weight", name)]
    assert len(scales) == 4
    assert all(not torch.equal(found[name], start[name]) for name in scales)


def test_the_epoch_is_chosen_on_held_out_classes(tmp_path, monkeypatch):
    values, states = iter([0.5, 0.7, 0.6]), []
    original = training.recall_at_k

    def scripted(embeddings, labels, ks, gallery=None):
        assert len(labels) == 40 * 8  # a fifth of the training classes
        found = original(embeddings, labels, ks, gallery)
        return {**found, "Recall@1": next(values)}

    def update(self, score, epoch):
        states.append({k: v.clone() for k, v in self.modules["model"].state_dict().items()})
        best(self, score, epoch)

    best = optim.Best.update
    monkeypatch.setattr(optim.Best, "update", update)
    monkeypatch.setattr(training, "recall_at_k", scripted)
    rows = main(tmp_path, "--choose-epoch", "--epochs", 3, "--baseline-only", "--export",
                tmp_path / "model.pt")  # fmt: skip
    validation = [float(r["value"]) for r in rows if r["metric"] == "validation Recall@1"]
    assert validation == [0.5, 0.7, 0.6]
    model = export.load(tmp_path / "model.pt")
    assert_same(dict(model.state_dict()), states[1])
    assert {r["epoch"] for r in rows if r["metric"] == "NMI"} == {"2"}
    assert re.search(
        r"^\| chosen epoch +\| +2 \|$", (tmp_path / "table.md").read_text(), re.MULTILINE
    )
    split = image_sets.load(parsed())
    recall = original(training.apply(model, split.test), split.test.labels)
    assert final(rows, "base")["Recall@1"] == pytest.approx(recall["Recall@1"], abs=2e-3)


# ---- ending early

INTERRUPT = """
import os, signal, sys
import train
from trainer import ranks, report
number, rank, calls = int(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
original, count = report.components, 0
def components(loss_func):  # within a step
    global count
    count += 1
    if count == calls and ranks.rank() == rank:
        os.kill(os.getpid(), number)
    return original(loss_func)
report.components = components
train.main()
"""
LONG = "--epochs 2 --steps-per-epoch 3 --batch-size 16 --dims 24 32 --threads 1 --quiet".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "calls", "run", "step"),
    [(signal.SIGINT, 2, "base", 2), (signal.SIGTERM, 10, "S2SD", 4)],
)
def test_ctrl_c_ends_with_a_checkpoint_from_which_the_run_goes_on(
    tmp_path, number, calls, run, step
):
    flags = [*LONG, "--no-report", "--output", tmp_path / "cut"]
    done = command("-c", INTERRUPT, int(number), 0, calls, *flags)
    assert done.returncode == 130
    assert f"Stopped after step {step} of {run}." in done.stderr
    assert "Traceback" not in done.stderr
    files = {p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()}
    expected = {f"{run}-{step:08d}.pt"} | ({"base-00000006.pt"} if run == "S2SD" else set())
    assert files == expected
    train.main([*map(str, flags), "--resume"])
    assert not (tmp_path / "cut" / "checkpoints").exists()  # they have served
    train.main([*LONG, "--no-report", "--output", str(tmp_path / "whole")])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_ctrl_c_in_the_last_scoring_loses_nothing(tmp_path, monkeypatch):
    original = report.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    out = ["--no-report", "--output", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr(report, "evaluate", interrupted)
        with pytest.raises(SystemExit) as caught:
            train.main([*LONG, *out])
    assert caught.value.code == 130
    assert {p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()} == {"base-00000006.pt"}
    train.main([*LONG, *out, "--resume"])
    train.main([*LONG, "--no-report", "--output", str(tmp_path / "whole")])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_an_image_that_cannot_be_read_ends_with_a_checkpoint(tmp_path, capsys):
    root = folder(tmp_path / "tree")
    flags = f"--dataset folder --image-size 32 --root {root} --batch-size 6 --per-class 2".split()
    flags += ["--quiet", "--no-report", "--epochs", "40", "--output", str(tmp_path / "out")]
    next(root.rglob("1.png")).write_bytes(b"no image at all")
    with pytest.raises(SystemExit) as caught:
        train.main([*flags, "--dims", "8", "--baseline-only"])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "1.png cannot be read as an image: cannot identify" in error
    assert "The same command with --resume goes on." in error
    assert len(checkpoint.files(tmp_path / "out" / "checkpoints")) == 1


def test_a_dry_run_finds_an_image_that_cannot_be_read(tmp_path, capsys):
    root = folder(tmp_path / "tree")
    flags = f"--dataset folder --root {root} --batch-size 6 --per-class 2 --dry-run".split()
    train.main(flags)
    next(root.rglob("1.png")).write_bytes(b"no image at all")
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "1.png cannot be read as an image" in capsys.readouterr().err


def test_results_of_other_settings_are_not_overwritten(tmp_path, capsys):
    first = main(tmp_path)
    with pytest.raises(SystemExit):
        main(tmp_path, "--lr", 0.1)
    assert "holds the results of a run with other settings" in capsys.readouterr().err
    again = main(tmp_path, "--export", tmp_path / "model.pt")  # the same numbers
    assert [r["value"] for r in again] == [r["value"] for r in first]


def test_other_images_are_another_run(tmp_path, capsys):
    root = folder(tmp_path / "tree")
    flags = f"--dataset folder --image-size 32 --batch-size 6 --per-class 2 --root {root}".split()
    flags += ["--epochs", 2, "--checkpoint-every", 2, "--baseline-only"]
    main(tmp_path / "out", *flags)
    moved = root.rename(tmp_path / "moved")
    main(tmp_path / "out", *flags, "--resume", "--root", moved)
    next(moved.rglob("1.png")).unlink()
    with pytest.raises(SystemExit):
        main(tmp_path / "out", *flags, "--resume", "--root", moved)
    assert "was written with other settings: data was" in capsys.readouterr().err


@pytest.fixture
def _interruptible():
    """Also where a shell ignores Ctrl-C for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_ctrl_c_ends_at_once():
    with stop.Request() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.made
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_at_the_same_step(tmp_path):
    script = tmp_path / "interrupt.py"
    script.write_text(INTERRUPT)
    flags = [*LONG, "--no-report", "--device", "cpu", "--output", tmp_path / "two"]
    done = command(*TORCHRUN, script, int(signal.SIGTERM), 1, 8, *flags)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("Stopped after step 2 of S2SD.") == 1
    done = command(*TORCHRUN, "examples/train.py", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert {r["step"] for r in read(tmp_path / "two") if r["run"] == "S2SD"} == {"3", "6"}


def test_checkpoints_of_another_run_are_not_overwritten(tmp_path, capsys):
    main(tmp_path, "--checkpoint-every", 3)
    with pytest.raises(SystemExit):
        main(tmp_path)
    assert "holds checkpoints: add --resume, or use another --output" in capsys.readouterr().err


# ---- settings from files


def test_later_settings_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.5\nbatch_size: 40\nexclude-self: true\nloss_args: {alpha: 3, beta: 4}\n"
                    "dims: [7, 8]\nvalidation: true\nhead_lr: null\n")  # fmt: skip
    args = parsed("--recipe", "sop-r50-128-margin", "--config", file, "--no-validation", "--lr", 2)
    found = (args.dataset, args.per_class, args.feature_distill_weight)
    assert found == ("sop", 2, 5)  # the recipe's
    assert (args.batch_size, args.exclude_self, args.dims) == (40, True, [7, 8])  # the file's
    assert args.loss_args == {"alpha": 3, "beta": 4}
    assert (args.lr, args.head_lr, args.validation) == (2.0, 2.0, False)  # given


def test_the_configuration_of_a_run_repeats_it(tmp_path):
    flags = ["--loss-args", "alpha=3", "--exclude-self", "--feature-distill-delay", 1, "--seed", 3]
    first = main(tmp_path / "a", *flags)
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    assert content["loss_args"] == {"alpha": 3}
    assert content["command"] == shlex.join(sys.argv)
    assert not {"output", "resume", "recipe"} & set(content)
    assert content["steps_per_epoch"] == 3
    out = ["--no-report", "--output", str(tmp_path / "b")]
    train.main(["--config", str(tmp_path / "a" / "config.json"), *out])
    again = read(tmp_path / "b")
    assert [{**r, "seconds": 0} for r in first] == [{**r, "seconds": 0} for r in again]


def test_the_weights_of_distillation_rise_along_the_ramp(tmp_path):
    weight = objectives.ramp(parsed("--ramp", 2, 6, "--accumulate", 2), 8.0)
    assert [weight(forward) for forward in (0, 4, 8, 12, 100)] == [0, 0, 4, 8, 8]
    assert objectives.ramp(parsed(), 8.0) == 8
    assert objectives.ramp(parsed("--ramp", 2, 6), 0.0) == 0
    late = main(tmp_path / "late", "--s2sd-only", "--feature-distill-delay", 0, "--ramp", 100, 200)
    no_kl = ("--distill-weight", 0, "--feature-distill-weight", 0)
    none = main(tmp_path / "none", "--s2sd-only", *no_kl)
    risen = main(tmp_path / "risen", "--s2sd-only", "--feature-distill-delay", 0, "--ramp", 1, 3)
    assert final(late, "S2SD")["loss"] == final(none, "S2SD")["loss"] < final(risen, "S2SD")["loss"]


def test_the_configuration_of_a_variant_without_features_repeats_too(tmp_path):
    main(tmp_path, "--variant", "msd", "--checkpoint-every", 3)
    args = parsed("--config", tmp_path / "config.json")
    assert (args.variant, args.feature_distill_weight, args.checkpoint_every) == ("msd", 0, None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--teacher lite2 --baseline-only", "--teacher is for the S2SD run"),
        ("--cut 600", "--cut 600 is more than --embedding-size 16"),
        ("--image-size 64", "--image-size 64: icons400 has 32"),
        ("--ramp 5 5", "--ramp 5 5: the second step must be the later one"),
        ("--lr-gamma 0.1", "--lr-gamma is for --schedule multistep"),
        ("--milestones 3", "--schedule multistep and --milestones EPOCH ... go together"),
        ("--validation --choose-epoch", "give one"),
        (
            "--teacher none.pt",
            "--teacher none.pt is no file of --export and no pretrained backbone",
        ),
        ("--weights none.pt", "--weights none.pt does not exist"),
        ("--device nonsense", "--device nonsense: Expected one of"),
        ("--workers -1", "'-1' is not a whole number"),
        ("--seed -1", "'-1' is not a whole number"),
        ("--ema 1.5", "1.5 is not between 0 and 1"),
        ("--validation --validation-share 0.001", "leaves 200 to train and 0 to choose by"),
        ("--matryoshka-dims 16", "16 is no prefix of --embedding-size 16"),
    ],
)
def test_flags_that_would_do_nothing_or_fail_later_are_refused(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as caught:
        main(tmp_path / "out", *flags.split())
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [1, 2", "cannot be read"),
        ("- lr", "holds no settings of the form name: value"),
        ("lrate: 1", "unknown argument --lrate: did you mean --lr"),
        ("lr: fast", "argument --lr: invalid rate value: 'fast'"),
        ("recipe: cub-r50-128-msim", "a file of settings cannot bring in another"),
    ],
)
def test_a_bad_file_of_settings_is_reported(tmp_path, capsys, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        options.parse(options.parser(), ["--config", str(file)])
    assert words in capsys.readouterr().err


def test_an_unknown_recipe_is_reported_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        options.parse(options.parser(), ["--recipe", "cub-r50"])
    assert "'cub-r50' is none of cars-ibn-512-msim, " in capsys.readouterr().err


@pytest.mark.skipif(image_sets.datasets is None, reason="PML reads CUB from version 2.9 on")
def test_a_dry_run_prints_settings_and_counts_and_writes_nothing(tmp_path, capsys):
    root, out = cub200(tmp_path / "tree"), tmp_path / "out"
    flags = ["--recipe", "cub-r50-128-msim", "--root", str(root), "--backbone", "cnn"]
    train.main([*flags, "--batch-size", "4", "--dry-run", "--output", str(out)])
    text = capsys.readouterr().out
    settings, _, counts = text.partition("\n\n")
    settings = json.loads(settings)
    assert settings["dims"] == [512, 1024, 1536, 2048]
    assert settings["steps_per_epoch"] == 18 // 4
    assert "| train | 6 | 18 | 3 | 3 |" in counts
    assert "| test | 6 | 18 | 3 | 3 |" in counts
    assert not out.exists()


# ---- what is written


def test_tensorboard_gets_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = main(tmp_path, "--epochs", 2)
    assert {p.name for p in tmp_path.iterdir()} == FILES | {"events"}
    for who in ("base", "S2SD"):
        found = EventAccumulator(str(tmp_path / "events" / who)).Reload()
        for metric in ("loss", "Recall@1", "NMI"):
            expected = [(int(r["step"]), float(r["value"])) for r in rows
                        if (r["run"], r["metric"]) == (who, metric)]  # fmt: skip
            scalars = [(e.step, e.value) for e in found.Scalars(metric)]
            assert scalars == [(step, pytest.approx(value)) for step, value in expected]


@pytest.mark.slow
def test_tensorboard_of_a_resumed_run_is_whole_and_of_a_new_one_new(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps():
        found = EventAccumulator(str(tmp_path / "events" / "base")).Reload()
        return [e.step for e in found.Scalars("loss")]

    cut = [*LONG, "--no-report", "--baseline-only", "--output", tmp_path]
    done = command("-c", INTERRUPT, int(signal.SIGINT), 0, 3, *cut)  # after the first epoch
    assert done.returncode == 130
    train.main([*map(str, cut), "--resume"])
    assert steps() == [3, 6]
    for file in checkpoint.files(tmp_path / "checkpoints"):
        file.unlink()
    train.main([str(flag) for flag in cut])
    assert steps() == [3, 6]


def test_wandb_is_named_where_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        main(tmp_path / "out", "--wandb", "project")
    assert "--wandb needs `pip install wandb`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- recipes

PAPER = {
    "dims": [512, 1024, 1536, 2048], "temperature": 1.0,
    "distill_weight": 50.0, "feature_distill_delay": 1000,
    "epochs": 150, "batch_size": 112, "per_class": 2, "optimizer": "adam", "lr": 1e-5,
    "weight_decay": 4e-4, "head_weight_decay": 0.0, "head_lr": 1e-5, "schedule": "constant",
    "image_size": 224, "exclude_self": False, "pretrained": True, "warmup": 0,
}  # fmt: skip
SETS = {"cub": "cub200", "cars": "cars196", "sop": "sop"}
ROWS = {
    "r50-128": ("resnet50", 128, True), "r50-512": ("resnet50", 512, True),
    "ibn-512": ("bninception", 512, False), "ibnf-512": ("bninception", 512, True),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("row", ROWS)
def test_the_recipes_are_the_authors_sample_runs(name, row):
    loss = "margin" if name == "sop" else "msim"
    args = parsed("--recipe", f"{name}-{row}-{loss}")
    assert {key: getattr(args, key) for key in PAPER} == PAPER
    assert (args.backbone, args.embedding_size, args.freeze_bn) == ROWS[row]
    assert args.dataset == SETS[name]
    if name == "sop":
        assert (args.variant, args.feature_distill_weight) == ("msdf", 5)
        assert (args.loss, args.miner) == ("MarginLoss", "DistanceWeightedMiner")
        loss_func, miner = by_name.pml_loss(args, 7)
        assert loss_func.beta.tolist() == pytest.approx([1.2] * 7)  # learned, one a class
        assert (loss_func.margin, miner.cutoff, miner.nonzero_loss_cutoff) == (0.2, 0.5, 1.4)
        assert args.loss_lr == 5e-4
    else:
        assert (args.variant, args.feature_distill_weight) == ("msdfa", 50)
        loss_func, miner = by_name.pml_loss(args, 7)
        assert (loss_func.alpha, loss_func.beta, loss_func.base) == (2, 40, 0.5)
        assert miner.epsilon == 0.1


def test_the_recipe_of_short_training_is_that_of_the_library():
    args, recipe = parsed("--recipe", "high-rate"), S2SDLoss.recipe("high-rate")
    assert tuple(args.dims) == recipe.pop("head_dims")
    assert (recipe.pop("head") is torch.nn.Linear) == args.linear_heads
    assert {key: getattr(args, key) for key in recipe} == recipe
    assert args.variant == "msdf"


def test_there_is_a_recipe_for_every_sample_run_and_no_flag_is_named_twice():
    sample = {f"{s}-{r}-{'margin' if s == 'sop' else 'msim'}" for s in SETS for r in ROWS}
    assert sample <= set(config.names())
    for name in config.names():
        text = (config.RECIPES / f"{name}.yaml").read_text()
        assert len(yaml.safe_load(text)) == len(re.findall(r"^\w+:", text, re.MULTILINE))


def test_a_folder_gets_one_pass_over_its_images_an_epoch(tmp_path):
    root = folder(tmp_path / "tree")
    flags = f"--dataset folder --root {root} --batch-size 4 --per-class 2 --accumulate 2"
    args = parsed_without_steps(*flags.split())
    split, _ = training.prepare(args)
    assert args.steps_per_epoch == len(split.train) // 8 == 2


def parsed_without_steps(*flags):
    return options.parse(options.parser(), list(flags))


def test_prefixes_have_a_row_a_size_in_both_runs(tmp_path, capsys):
    train.main([*SMALL, "--matryoshka-dims", "4", "8", "--no-report", "--output", str(tmp_path)])
    lines = {
        line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()[2:-2]
    }
    for size in (4, 8):
        _, _, base, s2sd, difference, *_ = lines[f"Recall@1, first {size}"].split("|")
        assert float(difference) == pytest.approx(float(s2sd) - float(base), abs=0.11)
        assert 0 < float(s2sd) < float(lines["Recall@1"].split("|")[3]) + 5


def test_an_outside_teacher_teaches_with_and_without_heads(tmp_path):
    model = tmp_path / "model.pt"
    train.main(
        [
            *SMALL,
            "--baseline-only",
            "--no-report",
            "--export",
            str(model),
            "--output",
            str(tmp_path / "a"),
        ]
    )
    for flags in ([], ["--dims", "--feature-distill-weight", "0"]):
        output = tmp_path / f"b{len(flags)}"
        teaching = ["--teacher", str(model), "--teacher-weight", "7", "--output", str(output)]
        train.main([*SMALL, "--s2sd-only", "--no-report", *teaching, *flags])
        config = json.loads((output / "config.json").read_text())
        assert (config["teacher"], config["teacher_weight"]) == (str(model), 7)
