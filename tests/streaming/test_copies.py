"""The order of copies: on a GPU each waits for what it needs; seen here with lanes that take notes."""

import threading

import pytest
import torch

import gradfold
from gradfold import Stream
from gradfold.streaming import Copies, streamer

from .scenes import folded, ghostly, made, same_bits, train


class Notes:
    """Lanes whose marks are numbers, and which check that every operation comes after those it depends on.

    Copies do not happen when they are asked for, but when somebody waits for them, as late as that is allowed. What a
    GPU may do while it is not waited for is thus done last: a wait that is missing gives wrong numbers.
    """

    def __init__(self):
        self.clock = 0
        self.queue = []  # (mark, to, values as they were needed)
        self.done = set()
        self.marks = {}

    def now(self):
        self.clock += 1
        self.done.add(self.clock)  # a CPU has computed all that it was given
        return self.clock

    def copy(self, pairs, after):
        self.clock += 1
        self.queue.append((self.clock, list(pairs), list(after)))
        return self.clock

    def _run(self, mark):
        if mark in self.done:
            return
        found = next(entry for entry in self.queue if entry[0] == mark)
        self.queue.remove(found)
        for earlier in found[2]:
            self._run(earlier)
        for to, source in found[1]:
            to.copy_(source)
        self.done.add(mark)

    def compute_after(self, mark):
        self._run(mark)

    def wait(self, mark):
        self._run(mark)

    def reached(self, mark):
        return mark in self.done


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.3}, {"accumulate": 2}], ids=["plain", "clip", "accumulate"])
def test_copies_that_come_as_late_as_they_may(monkeypatch, blocks, options):
    """Nothing is read before it was waited for, nor overwritten before it was read."""
    ghostly(monkeypatch)
    monkeypatch.setattr(streamer, "copies_for", lambda device, fake: Copies(Notes(), beside=False))
    runs = []
    for stream in (None, Stream(blocks=blocks, tile_bytes=10**6)):
        one = folded("llama", stream, dtype=torch.float32, **options)
        train(one[0], one[1], range(4), one[2], options.get("accumulate", 1))
        runs.append(one)
    same_bits(*runs)


@pytest.mark.parametrize("missing", ["compute_after", "after"])
def test_a_missing_wait_is_seen(monkeypatch, missing):
    """The notes above do tell: without waits, or with copies that wait for no other copy, numbers are wrong."""

    class Careless(Notes):
        def compute_after(self, mark):
            if missing != "compute_after":
                super().compute_after(mark)

        def copy(self, pairs, after):
            return super().copy(pairs, [] if missing == "after" else after)

    monkeypatch.setattr(streamer, "copies_for", lambda device, fake: Copies(Careless(), beside=False))
    runs = []
    with pytest.raises((AssertionError, gradfold.FoldError)):
        for stream in (None, Stream(tile_bytes=10**6)):
            one = folded("llama", stream, dtype=torch.float32)
            train(one[0], one[1], range(4), one[2])
            runs.append(one)
        same_bits(*runs)


def test_copies_are_made_on_another_thread_in_order():
    """While one computes, the other copies; tickets that come first are done first."""
    seen, gate = [], threading.Event()

    class Lanes:
        def now(self):
            return None

        def copy(self, pairs, after):
            gate.wait(10)
            seen.append((threading.current_thread().name, [float(source) for _, source in pairs]))

        def compute_after(self, mark): ...

        def wait(self, mark): ...

        def reached(self, mark):
            return True

    copies = Copies(Lanes())
    tickets = [copies.start([(torch.zeros(()), torch.tensor(float(i)))]) for i in range(3)]
    assert not any(ticket.is_over(copies.lanes) for ticket in tickets)
    gate.set()
    copies.settle()
    assert [values for _, values in seen] == [[0.0], [1.0], [2.0]]
    assert all(name.startswith("gradfold-stream") for name, _ in seen)
    copies.close()


def test_an_error_of_a_copy_is_raised_where_it_is_waited_for(monkeypatch):
    """A copy that fails (a file on a broken disk) is no silence: the step that needs it raises."""
    from gradfold.streaming.copies import NoLanes

    model = made("llama")
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
    fold = gradfold.fold(model, optimizer, stream=Stream())
    train(model, optimizer, range(1), fold)

    def broken(self, pairs, after):
        raise OSError("Input/output error")

    monkeypatch.setattr(NoLanes, "copy", broken)
    with pytest.raises(OSError, match="Input/output error"):
        train(model, optimizer, range(1, 2), fold)
