"""Streamed training equals torch's, in fp64, and the unstreamed fold's bit for bit."""

import functools

import pytest
import torch

import gradfold
from gradfold import Stream
from tests.pairs import each_pair

from .scenes import MODELS, distance, folded, ghostly, gpt2, loss_of, made, same_bits, train

SCHEMES = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "clip": {"clip_norm": 0.3},
    "two_pass": {"clip_norm": 0.3, "clip": "two_pass"},
    "all": {"accumulate": 2, "clip_norm": 0.3},
}
PLACES = {
    "cpu": lambda folder: Stream(),
    "disk": lambda folder: Stream(offload="disk", folder=folder, blocks=3),
    "tiles": lambda folder: Stream(tile_bytes=600),
    "ghosts": lambda folder: Stream(),
}
BITS = ("cpu", "disk", "ghosts")  # tiles sum the same numbers in products of another shape


def place(name, folder, monkeypatch):
    if name == "ghosts":
        ghostly(monkeypatch)
    return PLACES[name](folder)


@each_pair(name=MODELS, scheme=SCHEMES, where=PLACES)
def test_torch(name, scheme, where, tmp_path, monkeypatch):
    """Ten steps of AdamW are torch's, to 1e-10."""
    options = SCHEMES[scheme]
    # transformers takes the loss in fp32, which the folded head would round otherwise
    model, optimizer, fold = folded(name, place(where, tmp_path, monkeypatch), head="plain", **options)
    plain = made(name)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    accumulate, clip_norm = options.get("accumulate", 1), options.get("clip_norm")
    train(model, optimizer, range(10), fold, accumulate)
    train(plain, theirs, range(10), None, accumulate, clip_norm)
    assert distance(model, plain) <= 1e-10


STORAGES = {
    "fp32": {},
    "int8": {"states": "int8", "rounding": "stochastic", "small_size": 0},
    "int4": {"states": "int4", "rounding": "stochastic"},
    "bf16": {"states": "bf16", "rounding": "stochastic"},
    "split8": {"states": "int8", "master": "split8"},
}


@pytest.mark.parametrize("where", BITS)
@pytest.mark.parametrize("storage", STORAGES)
def test_bits_of_storage(storage, where, tmp_path, monkeypatch):
    """States in few bits, masters and stochastic rounding: the same bits as without a stream."""
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    options = {"dtype": dtype, "storage": STORAGES[storage]}
    one = folded("llama", **options)
    train(one[0], one[1], range(6), one[2])
    other = folded("llama", place(where, tmp_path, monkeypatch), **options)
    train(other[0], other[1], range(6), other[2])
    same_bits(one, other)


RULES = {
    "SGD": {},
    "Adam": {"amsgrad": True},
    "Lion": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {},
    "NAdam": {},
    "RAdam": {},
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
    "Rprop": {},
    "Adafactor": {},
    "AdamWScheduleFree": {},
    "AdamMini": {},
    "LAMB": {},
    "LARS": {"momentum": 0.9},
}


@pytest.mark.parametrize("rule", RULES)
def test_bits_of_rules(rule, monkeypatch):
    """Every rule: the same bits as without a stream."""
    ghostly(monkeypatch)
    options = {"dtype": torch.float32, "rule": rule, "lr": 1e-3, "storage": RULES[rule]}
    one, other = folded("stack", **options), folded("stack", Stream(), **options)
    train(one[0], one[1], range(4), one[2])
    train(other[0], other[1], range(4), other[2])
    same_bits(one, other)


def test_lazy_states():
    """SGD's momentum begins with the first gradient."""
    options = {"rule": "SGD", "storage": {"momentum": 0.9, "nesterov": True}}
    one, other = folded("llama", **options), folded("llama", Stream(tile_bytes=500), **options)
    train(one[0], one[1], range(4), one[2])
    train(other[0], other[1], range(4), other[2])
    assert distance(one[0], other[0]) <= 1e-14


def test_several_optimizers(monkeypatch):
    """Muon for matrices, AdamW for the rest."""
    ghostly(monkeypatch)

    def run(**stream):
        model = made("llama", torch.float32)
        matrices, others = gradfold.muon_groups(model)
        optimizers = [gradfold.Muon(matrices, lr=1e-2), gradfold.AdamW(others, lr=1e-2)]
        gradfold.fold(model, optimizers, **stream)
        for step in range(4):
            loss_of(model, step).backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
        return model

    assert distance(run(), run(stream=Stream())) == 0


WORKING_SETS = {
    "bytes": {"chunks": 3},
    "columns": {"chunks": 3, "axis": "in"},
    "layer": {"by": "layer"},
    "bands": {"chunks": 2, "by": "bands"},
    "reset": {"chunks": 3, "states": "reset"},
    "rest": {"chunks": 3, "rest": "sgd"},
    "sign": {"chunks": 3, "rest": "sign", "accumulate": 2},
    "offload": {"chunks": 3, "offload": "cpu"},
}


@pytest.mark.parametrize("storage", ["fp32", "int8"])
@pytest.mark.parametrize("cut", WORKING_SETS)
def test_working_sets(cut, storage, monkeypatch):
    """One chunk trains at a time: the same bits as without a stream."""
    ghostly(monkeypatch)
    settings = dict(WORKING_SETS[cut])
    accumulate = settings.pop("accumulate", 1)
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    options = {"dtype": dtype, "storage": STORAGES[storage], "accumulate": accumulate}
    runs = []
    for stream in (None, Stream()):
        working_set = gradfold.WorkingSet(interval=2, **settings)
        one = folded("llama", stream, working_set=working_set, **options)
        train(one[0], one[1], range(9), one[2], accumulate)
        runs.append(one)
    same_bits(*runs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_checkpoints_of_transformers(name, reentrant, monkeypatch):
    """gradient_checkpointing_enable(): blocks are not checkpointed twice."""
    ghostly(monkeypatch)
    model, optimizer, fold = folded(name, Stream(), head="plain")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain = made(name)
    train(model, optimizer, range(4), fold)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), range(4))
    assert distance(model, plain) <= 1e-10


def test_dropout():
    """A block that runs again draws the same numbers."""
    noisy = functools.partial(gpt2, resid_pdrop=0.3)
    one, two = folded(noisy), folded(noisy, Stream())
    for model, optimizer, fold in (one, two):
        torch.manual_seed(7)
        train(model, optimizer, range(3), fold)
    assert distance(one[0], two[0]) == 0


def test_autocast(monkeypatch):
    """Products in bf16 by autocast, also where a block runs again."""
    ghostly(monkeypatch)
    runs = []
    for stream in (None, Stream()):
        model, optimizer, _ = folded("llama", stream, dtype=torch.float32)
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
        runs.append((model, optimizer))
    same_bits(*runs)


def test_delayed_clipping():
    """clip="delayed" uses the same norms."""
    runs = []
    for stream in (None, Stream()):
        one = folded("llama", stream, clip_norm=0.2, clip="delayed")
        train(one[0], one[1], range(6), one[2])
        runs.append(one)
    same_bits(*runs)


def test_value_clipping_and_deferred_steps(monkeypatch):
    """Everything waits for optimizer.step()."""
    ghostly(monkeypatch)
    runs = []
    for stream in (None, Stream()):
        one = folded("gpt2", stream, clip_value=1e-3, timing="deferred")
        train(one[0], one[1], range(4), one[2])
        runs.append(one)
    same_bits(*runs)
