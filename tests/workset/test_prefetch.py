"""When the next chunk's states are fetched: in the last backward of a turn, once something awake has its gradient."""

import pytest
import torch
from torch import nn

import gradfold
from gradfold.workset import HostStore


class Watched(HostStore):
    """A store that writes down what is asked of it, and how many layers' inputs autograd still keeps."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def prefetch(self, keys, device):
        self.asked.append(("prefetch", sorted(keys)))
        super().prefetch(keys, device)

    def take(self, key, device):
        self.asked.append(("take", key))
        return super().take(key, device)

    def put(self, key, tensors):
        self.asked.append(("put", key))
        super().put(key, tensors)


def events(fold_options=None, steps=4, micro=1, **options):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)))
    store = Watched()
    optimizer = gradfold.AdamW(model.parameters(), lr=0.1)
    working_set = gradfold.WorkingSet(**{"interval": 1, "chunks": 2, "offload": store, **options})
    gradfold.fold(model, optimizer, working_set=working_set, **(fold_options or {}))
    found = []
    for _ in range(steps):
        for _ in range(micro):
            store.asked.clear()
            loss = model(torch.ones(3, 4)).sum()
            assert not store.asked  # not before backward
            loss.backward()
            found.append([what for what, _ in store.asked])
        store.asked.clear()
        optimizer.step()
        found.append([what for what, _ in store.asked])
        optimizer.zero_grad()
    return found


def test_in_the_last_step_of_a_turn():
    moved = ["put", "take"]
    assert events(interval=2) == [[], [], ["prefetch"], moved, [], [], ["prefetch"], moved]


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"accumulate": 2, "clip_norm": 1.0}])
def test_in_its_last_backward(options):
    assert events(options, steps=2, micro=2) == 2 * [[], ["prefetch"], ["put", "take"]]


def test_not_at_all():
    assert events(prefetch=0, steps=2) == 2 * [[], ["put", "take"]]


def test_nothing_is_kept_of_states_that_are_reset():
    assert events(states="reset", steps=2) == 2 * [["prefetch"], ["take"]]
