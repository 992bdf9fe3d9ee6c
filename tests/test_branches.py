"""The metric loss of each space: what losses and miners are called with, and what comes back."""

import pytest
import torch
from helpers import D, cosine_block
from pytorch_metric_learning import losses, miners
from torch import nn

from s2sd_pml.branches import Batch, Branch, MetricLosses, metric_loss
from s2sd_pml.errors import BatchError, UnsupportedLossError

Y = torch.arange(8) // 2
PAIRS = tuple(torch.tensor(i) for i in ([0, 2], [1, 3], [0, 2], [5, 6]))
OTHER = tuple(torch.tensor(i) for i in ([4], [5], [4], [0]))


class Spy(nn.Module):
    """A loss, or a miner, that notes what it is called with."""

    def __init__(self, returns=None):
        super().__init__()
        self.returns, self.calls = returns, []

    def forward(self, embeddings, *args, **kwargs):
        self.calls.append((embeddings, args, kwargs))
        self.product = (embeddings @ embeddings.T).dtype
        return embeddings.sum() if self.returns is None else self.returns

    @property
    def call(self):
        (call,) = self.calls
        return call


def draw(*widths, dtype=torch.float32):
    return [torch.randn(8, width, dtype=dtype, requires_grad=True) for width in widths]


# --- one loss -------------------------------------------------------------------------------------


def test_only_what_was_given_is_passed_on():
    (x,) = draw(D)
    for labels, expected in ((Y, (Y,)), (None, ())):
        spy = Spy()
        metric_loss(spy, None, x, labels)
        assert spy.call[0] is x
        assert spy.call[1:] == (expected, {})
    spy, miner = Spy(), Spy(PAIRS)
    (ref,) = draw(D)
    metric_loss(spy, miner, x, Y, None, ref, Y)
    assert miner.call[1:] == ((Y,), {"ref_emb": ref, "ref_labels": Y})
    assert spy.call[1:] == ((Y,), {"ref_emb": ref, "ref_labels": Y, "indices_tuple": PAIRS})


def test_given_pairs_replace_the_miner():
    spy, miner, (x,) = Spy(), Spy(OTHER), draw(D)
    metric_loss(spy, miner, x, Y, PAIRS)
    assert spy.call[2] == {"indices_tuple": PAIRS}
    assert not miner.calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_embeddings_that_are_their_own_references_stay_so_in_full_precision(dtype):
    """PML leaves pairs with itself out if ``ref_emb is embeddings``."""
    (x,) = draw(D, dtype=dtype)
    for ref, same in ((x, True), (x.detach(), False), (x.clone(), False)):
        spy, miner = Spy(), Spy(PAIRS)
        metric_loss(spy, miner, x, Y, None, ref, Y)
        for embeddings, _, given in (spy.call, miner.call):
            assert (given["ref_emb"] is embeddings) == same
            full = torch.float64 if dtype == torch.float64 else torch.float32
            assert {given["ref_emb"].dtype, embeddings.dtype} == {full}


def test_references_change_what_pml_returns():
    (x,) = draw(D)
    loss, miner = losses.ContrastiveLoss(), miners.MultiSimilarityMiner()
    plain = metric_loss(loss, miner, x, Y)
    assert metric_loss(loss, miner, x, Y, None, x, Y) == plain
    assert metric_loss(loss, miner, x, Y, None, x.clone(), Y) != plain


def test_losses_run_without_autocast():
    spy, (x,) = Spy(), draw(D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric_loss(spy, None, x, Y)
    assert spy.product == torch.float32


@pytest.mark.parametrize("value", [0, 3, -2.5])
def test_a_number_stays_that_number_and_has_a_graph(value):
    (x,) = draw(D)
    found = metric_loss(Spy(value), None, x, Y)
    assert found == value
    assert (found.dtype, found.shape) == (x.dtype, ())
    found.backward()
    assert not x.grad.any()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_of_one_element_is_a_scalar(shape):
    (x,) = draw(D)
    assert metric_loss(Spy(torch.full(shape, 2.0)), None, x, Y).shape == ()


def test_what_is_no_scalar_is_refused():
    (x,) = draw(D)
    with pytest.raises(UnsupportedLossError, match=r"Spy returned a tensor of shape \(8, 6\)"):
        metric_loss(Spy(x), None, x, Y)


def test_what_pml_refuses_is_a_batch_error_that_names_what_was_passed():
    (x,) = draw(D)
    with pytest.raises(BatchError, match=r"ContrastiveLoss refused embeddings \(8, 6\), labels"):
        metric_loss(losses.ContrastiveLoss(), None, x, Y[:5])
    with pytest.raises(BatchError, match=r"int64, ref_emb, indices_tuple\."):
        metric_loss(losses.ProxyAnchorLoss(4, D), None, x, Y, PAIRS, x)
    with pytest.raises(BatchError, match=r"int64, ref_emb, ref_labels\."):
        metric_loss(losses.ProxyAnchorLoss(4, D), None, x, Y, None, x.clone(), Y)


def test_an_error_of_custom_code_stays():
    class Failing(nn.Module):
        def forward(self, *args):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        metric_loss(Failing(), None, draw(D)[0], Y)


# --- every space ----------------------------------------------------------------------------------


def each(*values):
    return MetricLosses([Spy(v) for v in values], [None for _ in values])


def test_each_space_has_its_loss_its_miner_and_its_references():
    spaces, refs = draw(3, 4, 5), draw(3, 4, 5)
    mined = [tuple(i + k for i in PAIRS) for k in range(3)]
    every = MetricLosses([Spy() for _ in spaces], [Spy(pairs) for pairs in mined])
    values = every.one_by_one(Batch(spaces, refs, Y, None, Y))
    torch.testing.assert_close(values, torch.stack([x.sum() for x in spaces]))
    for k, (loss, miner) in enumerate(zip(*every, strict=True)):
        references = {"ref_emb": refs[k], "ref_labels": Y}
        assert miner.call == (spaces[k], (Y,), references)
        assert loss.call == (spaces[k], (Y,), {**references, "indices_tuple": mined[k]})


def test_given_pairs_serve_every_space_without_a_miner_and_the_first_alone_with_one():
    spaces = draw(3, 4, 5)
    every = MetricLosses([Spy() for _ in spaces], [Spy(OTHER), None, Spy(OTHER)])
    every.one_by_one(Batch(spaces, [None] * 3, Y, PAIRS))
    assert [loss.call[2]["indices_tuple"] for loss in every.losses] == [PAIRS, PAIRS, OTHER]
    assert [miner and len(miner.calls) for miner in every.miners] == [0, None, 1]


def test_values_are_in_the_precision_of_the_first_space():
    spaces = [*draw(3, dtype=torch.float64), *draw(4)]
    values = each(2.0, None).one_by_one(Batch(spaces, [None] * 2, Y))
    assert values.dtype == torch.float64
    spaces.reverse()
    assert each(2.0, None).one_by_one(Batch(spaces, [None] * 2, Y)).dtype == torch.float32


def known(loss=losses.MultiSimilarityLoss, miner=None, spaces=3):
    loss, miner = [loss() for _ in range(spaces)], [miner and miner() for _ in range(spaces)]
    return MetricLosses(loss, miner)


def test_which_batches_can_be_stacked():
    spaces, none = draw(3, 4, 5), [None] * 3
    plain, mined = known(), known(miner=miners.MultiSimilarityMiner)
    for every in (plain, mined):
        assert every.agree_with_pml()
        assert every.can_stack(Batch(spaces, none, Y))
        assert not every.can_stack(Batch(spaces, none, None))
        assert not every.can_stack(Batch(spaces, none, Y[:, None]))
        assert not every.can_stack(Batch(spaces, none, Y, None, Y))
        assert not every.can_stack(Batch(spaces, [*none[:2], spaces[2]], Y))
        assert not every.can_stack(Batch([*spaces[:2], spaces[2].double()], none, Y))
        assert not every.can_stack(Batch([*spaces[:2], spaces[2].to("meta")], none, Y))
    assert plain.can_stack(Batch(spaces, none, Y, PAIRS))
    assert not mined.can_stack(Batch(spaces, none, Y, PAIRS))
    mined.miners[1] = None
    assert not mined.can_stack(Batch(spaces, none, Y))
    assert not known(spaces=1).agree_with_pml()


def test_stacked_values_are_those_of_one_by_one():
    spaces = draw(3, 4, 5, dtype=torch.float64)
    for every in (known(), known(losses.NTXentLoss)):
        batch = Batch(spaces, [None] * 3, Y)
        for cosines in (None, cosine_block(spaces)):
            torch.testing.assert_close(every.stacked(batch, cosines), every.one_by_one(batch))


@pytest.mark.skipif(
    not hasattr(losses.SupConLoss, "_assert_either_pos_or_neg"), reason="PML 2.8 takes them"
)
def test_what_pml_refuses_of_all_spaces_is_the_same_batch_error():
    every, spaces = known(losses.SupConLoss), draw(3, 4, 5)
    both = Batch(spaces, [None] * 3, Y, (PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[1]))
    messages = []
    for compute in (lambda: every.stacked(both, None), lambda: every.one_by_one(both)):
        with pytest.raises(BatchError, match="SupConLoss refused embeddings") as error:
            compute()
        assert isinstance(error.value.__cause__, AssertionError)
        messages.append(str(error.value).replace(", indices_tuple.", "."))
    assert messages[0] == messages[1]


def test_what_is_no_fault_of_the_batch_stays(monkeypatch):
    def out_of_memory(*args):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr("s2sd_pml.stacking.stacked_losses", out_of_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        known().stacked(Batch(draw(3, 4, 5), [None] * 3, Y), None)


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [torch.float32, torch.float64, torch.bfloat16])
def test_a_head_works_in_its_own_precision(head):
    branch = Branch(nn.Linear(6, 3).to(head), Spy(), None)
    assert branch.project(torch.randn(8, 6), 3).dtype == head
    assert Branch(nn.Identity(), Spy(), None).project(torch.randn(8, 3).half(), 3).dtype == (
        torch.float16
    )


@pytest.mark.parametrize("returned", [(8, 4), (7, 3), (8, 3, 1)])
def test_a_head_of_another_shape_is_refused(returned):
    class Head(nn.Module):
        def forward(self, features):
            return features.new_zeros(returned)

    branch = Branch(Head(), Spy(), None)
    with pytest.raises(BatchError, match=r"dimension 3 .*\(8, 6\) into .*return \(8, 3\)"):
        branch.project(torch.randn(8, 6), 3)
