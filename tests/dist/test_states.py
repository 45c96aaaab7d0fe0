"""States of sharded parameters: bit for bit those of one process, DTensors in every state_dict, resharded by torch's
distributed checkpoints."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import gradfold
from tests.dist.states import (
    KINDS,
    Params,
    alone,
    differing,
    everything,
    mesh_of,
    optimizer_of,
    plain_states,
    train,
)


def stepped(kind, dim, folded, steps, zero=False):
    model = Params(kind, mesh_of(), dim, zero=zero)
    optimizer = optimizer_of(model, kind)
    fold = gradfold.fold(model, optimizer) if folded else None
    train(model, optimizer, range(steps))
    return model, optimizer, fold


def as_one_process(kinds, dims, folds):
    """Return what differs from one process, and which states are not DTensors."""
    found = {}
    for kind in kinds:
        want = everything(*alone(kind, 3))
        for dim in dims:
            for folded in folds:
                model, optimizer, fold = stepped(kind, dim, folded, 3)
                key = f"{kind} Shard({dim}) {'folded' if folded else 'plain'}"
                found[key] = differing(everything(model, optimizer), want), plain_states(model, optimizer)
                if fold is not None:
                    fold.remove()
    return found


def test_states_are_those_of_one_process(two):
    for found in two.run(as_one_process, list(KINDS), [0, 1], [False, True]):
        assert found == {key: ([], []) for key in found}
        assert len(found) == 16


if __name__ == "__main__":
    from tests.dist.world import World
    w = World(2)
    try:
        for f in w.run(as_one_process, list(KINDS), [0, 1], [False, True]):
            for k, v in f.items(): print(k, v)
    finally:
        w.stop()
