"""Settings: what is refused, what it becomes, and that it can be a key."""

import dataclasses

import pytest
import torch
from torch import nn

import gradfold
from gradfold._options import OPTIMIZERS
from gradfold.planner.errors import PlanError
from gradfold.planner.settings import Settings
from gradfold.workset import WorkingSet

ALWAYS_A_LIST = WorkingSet(chunks=2, always=["norm"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens=0: give a whole number, 1 or more"),
        ({"tokens": 1.5}, "tokens=1.5"),
        ({"batch": True}, "batch=True"),
        ({"accumulate": -1}, "accumulate=-1"),
        ({"dtype": "float16"}, "dtype='float16': one of 'float32'"),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16"),
        ({"optimizer": "Moun"}, "optimizer='Moun': one of AdamW"),
        ({"fold": False, "working_set": ALWAYS_A_LIST}, "working_set=.* with fold=False"),
        ({"fold": False, "clip": "two_pass"}, "clip='two_pass' with fold=False"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        Settings(**changes)


def test_every_optimizer_of_the_library_is_offered():
    made = {name for name in gradfold.__all__ if isinstance(getattr(gradfold, name), type)}
    assert set(OPTIMIZERS) == {name for name in made if issubclass(getattr(gradfold, name), torch.optim.Optimizer)}


def test_dtype():
    assert Settings().torch_dtype(None) is torch.bfloat16
    assert Settings().torch_dtype(torch.float32) is torch.float32
    assert Settings(dtype="float64").torch_dtype(torch.float32) is torch.float64


def test_the_optimizer_is_asked_for_what_is_set():
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = Settings(optimizer="Lion", states="int8", small_size=0, options={"betas": (0.5, 0.6)}).make_optimizer(
        [weight]
    )
    assert type(optimizer) is gradfold.Lion
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert optimizer.param_groups[0]["small_size"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": "int3"}, "AdamW: .*int3"),
        ({"options": {"momentums": 1}}, "AdamW: .*momentums"),
        ({"options": {"states": "int8"}, "states": "int4"}, "AdamW: .*states"),
    ],
)
def test_what_the_optimizer_refuses(changes, message):
    with pytest.raises(PlanError, match=message):
        Settings(**changes).make_optimizer([nn.Parameter(torch.zeros(8, 8))])


def test_equal_settings_are_one_key():
    many = [Settings(), Settings(options={}), Settings(options={"betas": [0.9, 0.95]})]
    many += [Settings(working_set=ALWAYS_A_LIST), Settings(working_set=dataclasses.replace(ALWAYS_A_LIST))]
    assert len(set(many)) == 3


def test_describe():
    assert Settings().describe() == "AdamW"
    turns = WorkingSet(chunks=8, offload="cpu")
    said = Settings(
        states="int8", master="split8", checkpointing=True, accumulate=4, clip_norm=1.0, working_set=turns, head="plain"
    ).describe()
    for word in ("int8 states", "split8 masters", "plain head", "checkpointing", "4 batches", "clip_norm 1 (exact)"):
        assert word in said
    assert "working set of 8 chunks, sleeping states in host memory, prefetch 1" in said
    assert "a chunk for each layer" in Settings(working_set=WorkingSet(by="layer")).describe()
    assert "not folded" in Settings(fold=False).describe()
