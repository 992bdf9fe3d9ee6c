"""Whatever is done to embeddings, in whatever order: their features are right, or refused.

A plain model runs along with the capture: for every tensor alive it knows the features of each of
its rows, or that there are none.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from dataclasses import dataclass, field

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s2sd_pml import FeatureCapture
from s2sd_pml.errors import MissingFeaturesError

KEEPS_ROWS = {
    "normalised": lambda e: F.normalize(e, dim=1),
    "cast": lambda e: e.to(torch.bfloat16).float(),
    "scaled": lambda e: e * 2 + 1,
    "columns swapped": lambda e: e[:, [1, 0, 2]],
    "dropout": lambda e: F.dropout(e, 0.5),
    "batch norm": lambda e: F.batch_norm(e, None, None, training=True) if len(e) > 1 else e + 0,
}
SELECTS_ROWS = {
    "slice": lambda t: t[1:],
    "step": lambda t: t[::2],
    "negative slice": lambda t: t[-2:],
    "index": lambda t: t[torch.arange(len(t) - 1, -1, -1)],
    "repeated": lambda t: t[torch.zeros(3, dtype=torch.long)],
    "mask": lambda t: t[torch.arange(len(t)) % 3 != 1],
    "split": lambda t: t.split(2)[-1],
}
MIXES_ROWS = {
    "flipped": lambda e: e.flip(0),
    "rolled": lambda e: e.roll(1, 0),
    "mixed": lambda e: torch.rand(len(e), len(e)) @ e,
    "detached": lambda e: e.detach(),
    "sorted": lambda e: e.sort(dim=0).values,
}


@dataclass
class Entry:
    """Embeddings, the features of their rows (None: they must be refused), their forwards."""

    embeddings: Tensor
    features: Tensor | None
    forwards: set[int] = field(default_factory=set)
    used: bool = False  # by backward, which frees what a replay may need


class CaptureMachine(RuleBasedStateMachine):
    """Random lives of embeddings."""

    @initialize(side=st.sampled_from(["input", "output"]))
    def build(self, side):
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.embedder = nn.Linear(6, 3)
        self.capture = FeatureCapture(self.trunk if side == "output" else self.embedder, side)
        self.entries: list[Entry] = []
        self.features: dict[int, weakref.ref[Tensor]] = {}
        self.released: set[int] = set()

    def add(self, entry):
        self.entries = [*self.entries[-7:], entry]

    def features_of(self, embeddings):
        try:
            return self.capture.features_of(embeddings), ""
        except MissingFeaturesError as error:
            return None, str(error)

    def pick(self, data, label="which"):
        return data.draw(st.sampled_from(self.entries), label)

    @rule(rows=st.integers(1, 5), training=st.booleans())
    def forward(self, rows, training):
        self.embedder.train(training)
        features = self.trunk(torch.randn(rows, 4))
        number = len(self.features)
        self.features[number] = weakref.ref(features)
        self.add(Entry(self.embedder(features), features.detach().clone(), {number}))

    @rule(rows=st.integers(1, 5))
    def checkpointed_forward(self, rows):
        x = torch.randn(rows, 4)
        features = checkpoint(self.trunk, x, use_reentrant=False)
        self.add(Entry(self.embedder(features), features.detach().clone()))

    @rule(rows=st.integers(1, 5))
    def forward_without_gradient(self, rows):
        with torch.no_grad():
            self.add(Entry(self.embedder(self.trunk(torch.randn(rows, 4))), None))

    @rule(rows=st.integers(1, 5))
    def forward_of_a_copy(self, rows):
        trunk, embedder = copy.deepcopy([self.trunk, self.embedder])
        self.add(Entry(embedder(trunk(torch.randn(rows, 4))), None))

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), how=st.sampled_from(sorted(KEEPS_ROWS)))
    def keep_rows(self, data, how):
        e = self.pick(data)
        self.add(Entry(KEEPS_ROWS[how](e.embeddings), e.features, e.forwards, e.used))

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), how=st.sampled_from(sorted(SELECTS_ROWS)))
    def select_rows(self, data, how):
        e, select = self.pick(data), SELECTS_ROWS[how]
        chosen = select(e.embeddings)
        if len(chosen) > 0:
            features = None if e.features is None else select(e.features)
            self.add(Entry(chosen, features, e.forwards, e.used))

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), how=st.sampled_from(sorted(MIXES_ROWS)))
    def mix_rows(self, data, how):
        e = self.pick(data)
        if len(e.embeddings) > 1:
            self.add(Entry(MIXES_ROWS[how](e.embeddings), None, e.forwards, e.used))

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def concatenate(self, data):
        parts = [self.pick(data, f"part {i}") for i in range(data.draw(st.integers(2, 3)))]
        features = None
        if all(p.features is not None for p in parts):
            features = torch.cat([p.features for p in parts])
        forwards = set().union(*(p.forwards for p in parts))
        joined = torch.cat([p.embeddings for p in parts])
        self.add(Entry(joined, features, forwards, any(p.used for p in parts)))

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def add_two(self, data):
        a, b = self.pick(data, "a"), self.pick(data, "b")
        if len(a.embeddings) != len(b.embeddings) or a.features is None or b.features is None:
            return
        if not torch.equal(a.features, b.features):  # whose features would they be?
            forwards, used = a.forwards | b.forwards, a.used or b.used
            self.add(Entry(a.embeddings + b.embeddings, None, forwards, used))

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def go_backward(self, data):
        e = self.pick(data)
        if e.embeddings.requires_grad:
            retain = data.draw(st.booleans())
            with contextlib.suppress(RuntimeError):  # another backward has freed the graph
                e.embeddings.square().sum().backward(retain_graph=retain)
                self.released |= set() if retain else e.forwards
            for other in self.entries:  # a checkpointed forward has no number of its own
                unknown = not (other.forwards and e.forwards)
                other.used |= unknown or bool(other.forwards & e.forwards)

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def forget(self, data):
        self.entries.pop(data.draw(st.integers(0, len(self.entries) - 1)))

    @invariant()
    def features_are_right_or_refused(self):
        for e in getattr(self, "entries", []):
            found, refusal = self.features_of(e.embeddings)
            if found is None:
                assert "features=" in refusal
                assert e.features is None or e.used, refusal
            else:
                assert e.features is not None, "found where there are none"
                assert torch.equal(found, e.features)

    @invariant()
    def features_live_no_longer_than_their_graph(self):
        gc.collect(0)
        wanted = set().union(*(e.forwards for e in getattr(self, "entries", [])))
        for number, ref in getattr(self, "features", {}).items():
            if number in wanted and number not in self.released:
                continue
            if ref() is not None:  # in a cycle of an older generation
                gc.collect()
            assert ref() is None


TestCaptureMachine = CaptureMachine.TestCase
TestCaptureMachine.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
