"""`plan()`: what it refuses, what overrides what, and that it does not depend on where it is called."""

import gc
import json
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradfold.planner.allocator import CONTEXT_BYTES
from gradfold.planner.api import plan
from gradfold.planner.baselines import BASELINES
from gradfold.planner.errors import PlanError
from gradfold.planner.settings import Settings
from tests.planner.small import llama

transformers = pytest.importorskip("transformers")


def made(model=None, settings=None, **changes):
    return plan(
        llama(1) if model is None else model, settings, **{"tokens": 8, "batch": 1, "baselines": False, **changes}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": 3}, "token=3: there is no such setting; there is accumulate, batch"),
        ({"device": "mps"}, "device='mps': 'cuda' .* or 'cpu'"),
        ({"settings": 3}, "settings=3: give a gradfold.planner.Settings, or a Recipe"),
        ({"tokens": 0}, "tokens=0"),
        ({"states": "int3"}, "AdamW: .*int3"),
        ({"model": 3}, "model=3"),
        ({"model": nn.Linear(3, 3)}, "model Linear: its forward takes no input_ids; a plan calls model"),
        ({"model": nn.Sequential, "checkpointing": True}, "checkpointing=True: Sequential has none|forward takes no"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        made(**changes)


class NoLoss(nn.Embedding):
    def __init__(self):
        super().__init__(10, 4)

    def forward(self, input_ids, labels):
        return super().forward(input_ids)


class Looks(NoLoss):
    def forward(self, input_ids, labels):
        return types.SimpleNamespace(loss=super().forward(input_ids, labels).sum() * float(self.weight[0, 0].item()))


def test_a_model_without_a_loss_and_one_that_looks():
    with pytest.raises(PlanError, match=r"what it returns has no \.loss"):
        made(NoLoss)
    with pytest.raises(PlanError, match="looks at the values of its tensors"):
        made(Looks())


@pytest.mark.slow
def test_positions_that_were_learned_end():
    def gpt2(positions):
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 100}
        return transformers.GPT2Config(n_positions=positions, bos_token_id=0, eos_token_id=0, **sizes)

    with pytest.raises(PlanError, match="tokens=9: transformer.wpe of gpt2 ends at 8"):
        made(gpt2(8), tokens=9)
    assert made(gpt2(8)).peak_bytes
    assert made(llama(1, max_position_embeddings=8), tokens=9).peak_bytes  # rotary ones do not


def test_changes_override_settings():
    settings = Settings(tokens=99, batch=1, states="int8")
    made_plan = made(settings=settings, tokens=8)
    assert (made_plan.settings.tokens, made_plan.settings.states) == (8, "int8")
    recipe = types.SimpleNamespace(plan_settings=lambda: settings)
    assert made(settings=recipe, states="int4").settings == Settings(tokens=8, batch=1, states="int4")


def test_a_plan():
    said = []
    result = made(llama(1, dtype="bfloat16"), baselines=True, progress=said.append)
    assert [baseline.label for baseline in result.baselines] == [name for name in BASELINES if name != "plain Muon"]
    assert len(said) == 4
    assert result.dtype == "bfloat16"
    assert result.device_bytes == result.allocated.allocated_bytes + CONTEXT_BYTES
    assert result.peak_bytes <= result.allocated.allocated_bytes <= result.allocated.reserved_bytes
    assert result.fits(result.device_bytes) and not result.fits(result.device_bytes - 1)
    report = json.loads(json.dumps(result.as_dict()))
    assert report["peak_bytes"] == result.peak_bytes and report["parameters"] == result.predicted.parameters
    assert "peak" in str(result)


AROUND = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "fakes": FakeTensorMode,
}


@pytest.fixture(scope="module")
def alone():
    return made().memory.as_dict()


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_the_callers_modes_change_nothing(around, alone):
    with around():
        assert made().memory.as_dict() == alone


def test_the_default_dtype_is_that_of_step_counts(alone):
    torch.set_default_dtype(torch.float64)
    try:
        assert made().peak_bytes == pytest.approx(alone["peak_bytes"], rel=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_stays_frozen():
    held = gc.get_freeze_count()  # conftest's: as a user's own
    made()
    assert gc.get_freeze_count() >= held // 2 > 0
    gc.unfreeze()
    try:
        made()
        with pytest.raises(PlanError):
            made(NoLoss)
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_a_module_is_left_as_it_is():
    model = transformers.AutoModelForCausalLM.from_config(llama(1)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert made(model, dtype="bfloat16").dtype == "bfloat16"
    assert made(model).dtype == "float32"
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_what_a_function_builds_keeps_its_dtype():
    def build():
        return transformers.AutoModelForCausalLM.from_config(llama(1), dtype=torch.float32)

    result = made(build)
    assert (result.model, result.dtype) == ("build", "float32")
    assert result.memory.at_peak()["weights"] >= 4 * result.predicted.parameters
