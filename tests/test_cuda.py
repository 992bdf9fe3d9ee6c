"""On a GPU the same as on the CPU: values, gradients, half precision, compilation, ranks."""

from __future__ import annotations

import contextlib
import copy
import functools
import io

import pytest
import torch
from helpers import D, Model, images, labels
from pytorch_metric_learning import losses, miners
from test_distributed import on_ranks
from torch.nn.parallel import DistributedDataParallel

from s2sd_pml import S2SDLoss
from s2sd_pml.functional import relation_kl, relation_kl_reference

GPU = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m cuda"),
]

CASES = {
    "multi-similarity": lambda: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
    "not mined": lambda: (losses.MultiSimilarityLoss(), None),
    "lifted": lambda: (losses.GeneralizedLiftedStructureLoss(), None),
    "circle": lambda: (losses.CircleLoss(), None),
    "contrastive": lambda: (losses.ContrastiveLoss(), None),
    "supervised contrastive": lambda: (losses.SupConLoss(), None),
    "triplets": lambda: (losses.TripletMarginLoss(), None),
    "mined triplets": lambda: (losses.TripletMarginLoss(), miners.TripletMarginMiner()),
    "margin": lambda: (losses.MarginLoss(learn_beta=True, num_classes=6), None),
    "softmax": lambda: (losses.NTXentLoss(), None),
    "proxies": lambda: (losses.ProxyAnchorLoss(6, D), None),
    "classes": lambda: (losses.ArcFaceLoss(6, D), None),
    "memory": lambda: (losses.CrossBatchMemory(losses.ContrastiveLoss(), D, 64), None),
}
BEYOND = {"matryoshka_dims": (2, 4), "teacher_weight": 3.0}
SETTINGS = {
    "paper": {},
    "high-rate": {
        **S2SDLoss.recipe("high-rate"),
        "head_dims": (8, 9),
        "feature_distill_delay": 0,
    },
    "chunks": {"chunk_size": 7},
    "maps": {"pooling": "avg+max"},
    "prefixes": {"matryoshka_dims": (4, 2)},
    "prefixes in chunks": {"matryoshka_dims": (4, 2), "chunk_size": 7},
}


def make(device, case="multi-similarity", dtype=torch.float32, **kwargs):
    torch.manual_seed(1)
    model = Model().to(dtype)
    loss, miner = CASES[case]()
    where = {"trunk": model.trunk} if "pooling" in kwargs else {"embedder": model.embedder}
    kwargs = {"head_dims": (8, 9), "feature_distill_delay": 0, "feature_dim": 12, **where, **kwargs}
    loss_func = S2SDLoss(loss, miner, **kwargs).to(dtype)
    return model.to(device), loss_func.to(device)


def one_step(device, x, autocast=None, **kwargs):
    """The value, the components and the gradients of a step, on the CPU."""
    model, loss_func = make(device, dtype=x.dtype, **kwargs)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss_func(model(x.to(device)), labels().to(device))
    value.backward()
    parameters = [*model.parameters(), *loss_func.parameters()]
    found = [value, *loss_func.components.values(), *(p.grad for p in parameters)]
    return [t.detach().cpu() for t in found]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_cpu(case, settings):
    x = images(dtype=torch.float64)
    here, there = (one_step(device, x, case=case, **settings) for device in ("cpu", GPU))
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 100])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("tf32", [False, True])
def test_distillation_is_its_plain_twin_in_double_precision(
    tf32, temperature, exclude_self, chunk_size
):
    student, teachers = torch.randn(300, 32), [torch.randn(300, d) for d in (64, 512)]

    def distil(function, device, dtype, **kwargs):
        s = student.to(device, dtype).requires_grad_()
        kwargs |= {"temperature": temperature, "exclude_self": exclude_self}
        ts = [t.to(device, dtype) for t in teachers]
        kl = function(s, ts, **kwargs)
        (50 * kl[0] + 20 * kl[1]).backward()
        return [t.detach().cpu().double() for t in (kl, s.grad)]

    want = distil(relation_kl_reference, "cpu", torch.float64)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        found = distil(relation_kl, GPU, torch.float32, chunk_size=chunk_size)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    error = [float((f - w).norm() / w.norm()) for f, w in zip(found, want, strict=True)]
    assert max(error) < (2e-2 if tf32 else 1e-4), error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_autocast_changes_no_more_than_the_precision_of_the_model(settings, dtype):
    whole = one_step("cpu", x := images(), **settings)
    half = one_step(GPU, x, autocast=dtype, **settings)
    torch.testing.assert_close(half[0], whole[0], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_with_a_grad_scaler(dtype):
    model, loss_func = make(GPU, distill_weight=5.0, feature_distill_weight=5.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_func.add_to(optimizer)
    before = copy.deepcopy([model, loss_func])
    kind = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # before torch 2.3
    scaler = kind(enabled=dtype == torch.float16)
    x, y, values = images().to(GPU), labels().to(GPU), []
    for _ in range(40):
        with torch.autocast(GPU, dtype=dtype):
            value = loss_func(model(x), y)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        values.append(value.item())
    assert sum(values[-5:]) < sum(values[:5])
    moved = zip(before[1].parameters(), loss_func.parameters(), strict=True)
    assert all(not torch.equal(p, q) for p, q in moved)


def test_a_loss_that_was_left_on_the_cpu_follows_the_features():
    model, loss_func = make("cpu")
    model.to(GPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_func.add_to(optimizer)
    before = [p.detach().clone() for p in loss_func.parameters()]
    loss_func(model(images().to(GPU)), labels().to(GPU)).backward()
    optimizer.step()
    assert all(p.is_cuda for p in loss_func.parameters())
    assert all(
        not torch.equal(p.cpu(), q) for p, q in zip(loss_func.parameters(), before, strict=True)
    )


def test_labels_on_the_cpu_are_those_of_the_gpu():
    model, loss_func = make(GPU)
    x = images().to(GPU)
    torch.testing.assert_close(loss_func(model(x), labels()), loss_func(model(x), labels().to(GPU)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_as_the_plain_one(mode):
    """ "reduce-overhead" replays CUDA graphs, whose memory is written over in the next step."""
    torch._dynamo.reset()
    trained = []
    for compiled in (False, True):
        model, loss_func = make(GPU)
        embed = torch.compile(model, mode=mode) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loss_func.add_to(optimizer)
        torch.manual_seed(3)
        for _ in range(6):
            optimizer.zero_grad()
            loss_func(embed(images().to(GPU)), labels().to(GPU)).backward()
            optimizer.step()
        trained.append([p.detach() for m in (model, loss_func) for p in m.parameters()])
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("devices", [(GPU, "cpu"), ("cpu", GPU)])
def test_a_checkpoint_goes_on_on_another_device(devices):
    first, second = devices
    model, loss_func = make(first, feature_distill_delay=1)
    loss_func(model(images().to(first)), labels().to(first))
    file = io.BytesIO()
    torch.save([model.state_dict(), loss_func.state_dict()], file)
    file.seek(0)
    states = torch.load(file, map_location=second, weights_only=True)
    other = make(second, feature_distill_delay=1)
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    x = images()
    values = [
        loss_func(model(x.to(device)), labels().to(device)).cpu()
        for (model, loss_func), device in (((model, loss_func), first), (other, second))
    ]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    assert int(other[1].step) == 2


def test_deterministic_algorithms_suffice(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        x = images()
        assert all(
            torch.equal(a, b) for a, b in zip(one_step(GPU, x), one_step(GPU, x), strict=True)
        )
    finally:
        torch.use_deterministic_algorithms(False)


def rank_on_the_gpu(rank, *, x):
    """What one of two ranks has after a step on its half of the batch."""
    model, loss_func = make(GPU, gather_distributed=True)
    wrapped = DistributedDataParallel(model), DistributedDataParallel(loss_func)
    half = len(x) // 2
    own = slice(rank * half, (rank + 1) * half)
    value = wrapped[1](wrapped[0](x[own].to(GPU)), labels()[own].to(GPU))
    value.backward()
    found = [value, *(p.grad for m in (model, loss_func) for p in m.parameters())]
    return {str(i): t.detach().cpu() for i, t in enumerate(found)}


def test_two_ranks_on_one_gpu_are_one_process():
    x = images()
    model, loss_func = make(GPU)
    value = loss_func(model(x.to(GPU)), labels().to(GPU))
    value.backward()
    want = [value, *(p.grad for m in (model, loss_func) for p in m.parameters())]
    for found in on_ranks(functools.partial(rank_on_the_gpu, x=x), 2):
        for i, t in enumerate(want):
            close = torch.from_numpy(found[str(i)])
            torch.testing.assert_close(close, t.detach().cpu(), rtol=1e-3, atol=1e-4)


def test_one_nccl_rank_is_no_rank(tmp_path):
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        x = images()
        torch.testing.assert_close(one_step(GPU, x, gather_distributed=True), one_step(GPU, x))
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def waiting_is_an_error():
    """No value may be read back while work is queued: the GPU never idles for Python."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed():
    x = torch.ones(2, device=GPU)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@pytest.mark.parametrize("chunk_size", [None, 20])
def test_the_kl_waits_for_nothing(chunk_size):
    student = torch.randn(64, 8, device=GPU, requires_grad=True)
    teachers = [torch.randn(64, d, device=GPU) for d in (16, 32)]

    def distil():
        kwargs = {"exclude_self": True, "temperature": 0.5, "chunk_size": chunk_size}
        relation_kl(student, teachers, **kwargs).sum().backward()

    distil()  # handles are made
    with waiting_is_an_error():
        distil()


@pytest.mark.parametrize("how", ["given", "captured", "beyond"])
@pytest.mark.parametrize("case", ["multi-similarity", "not mined", "lifted"])
def test_a_training_step_waits_for_nothing(case, how):
    beyond = BEYOND if how == "beyond" else {}
    model, loss_func = make(GPU, case, feature_distill_delay=3, **beyond)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_func.add_to(optimizer)
    x, y = images().to(GPU), labels().to(GPU)

    def step():
        features = model.trunk(x).mean(dim=(2, 3))
        given = {"features": features} if how == "given" else {}
        given |= {"teachers": {"t": x.flatten(1)}} if beyond else {}
        loss_func(model.embedder(features), y, **given).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()  # handles are made
    with waiting_is_an_error():
        for _ in range(3):
            step()
    assert loss_func.step == 5
    assert loss_func.components["feature_distill"] > 0


def leaves_on_the_gpu():
    x = torch.randn(24, D, device=GPU, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(24, 12, device=GPU, dtype=torch.float64, requires_grad=True)


def step_of(loss_func, embeddings, features, y, **given):
    """The value and the gradients, in buffers that stay where they are."""
    value = loss_func(embeddings, y, features=features, **given)
    value.backward()
    return value


@pytest.mark.parametrize("beyond", [{}, BEYOND], ids=["paper", "prefixes and a teacher"])
@pytest.mark.parametrize("case", ["multi-similarity", "not mined"])
def test_the_step_can_be_captured_in_a_cuda_graph(case, beyond):
    """Replayed with other numbers in its inputs, it gives what an eager step gives."""
    _, loss_func = make(GPU, case, dtype=torch.float64, **beyond)
    (embeddings, features), y = leaves_on_the_gpu(), labels().to(GPU)
    teacher = torch.randn(24, 7, device=GPU)
    given = {"teachers": {"t": teacher}} if beyond else {}
    trained = [embeddings, features, *loss_func.parameters()]
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):  # as PyTorch asks for before a capture
            step_of(loss_func, embeddings, features, y, **given)
    torch.cuda.current_stream().wait_stream(side_stream)
    for p in trained:
        p.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step_of(loss_func, embeddings, features, y, **given)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (embeddings, features, teacher):
                x.copy_(torch.randn_like(x))
            y.copy_(torch.randint(6, (24,)))
        graph.replay()
        found = [value.detach().clone(), *(p.grad.clone() for p in trained)]
        copies = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        want = step_of(loss_func, embeddings, features, y, **given)
        want = [want.detach(), *(p.grad for p in trained)]
        for p, grad in zip(trained, copies, strict=True):
            p.grad = grad  # the graph writes to these
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(torch.__version__ < "2.4", reason="fullgraph works from there on")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("case", ["multi-similarity", "not mined"])
def test_the_compiled_loss_is_the_eager_one(case, mode):
    torch._dynamo.reset()
    _, eager = make(GPU, case, dtype=torch.float64, feature_distill_delay=3)
    _, other = make(GPU, case, dtype=torch.float64, feature_distill_delay=3)
    compiled, y = torch.compile(other, fullgraph=True, mode=mode), labels().to(GPU)
    for k in range(6):
        torch.manual_seed(k)
        found, (embeddings, features) = [], leaves_on_the_gpu()
        for module, call in ((other, compiled), (eager, eager)):
            module.zero_grad()
            x, φ = (t.detach().clone().requires_grad_() for t in (embeddings, features))
            value = step_of(call, x, φ, y)
            grads = [p.grad for p in (x, φ, *module.parameters())]
            found.append([t.detach().clone() for t in (value, *grads)])
        torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)
    assert other.step == eager.step == 6
