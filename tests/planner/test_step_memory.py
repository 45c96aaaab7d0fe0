"""A step's memory: fake against real, both against the allocator's own events, and by hand on one Linear."""

import copy

import pytest
import torch
from torch import nn

from gradfold.planner.step import measure_step, step_memory
from gradfold.planner.trace import CATEGORIES
from tests.allocator import peak_bytes
from tests.llama import small_llama

transformers = pytest.importorskip("transformers")


def llama_config(vocab=1000, hidden=128, layers=3, **kwargs):
    return small_llama(vocab, hidden, layers, num_key_value_heads=2, **kwargs)


def llama_batch(config, tokens):
    ids = torch.randint(0, config.vocab_size, (2, tokens // 2))
    return {"input_ids": ids, "labels": ids}


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


class SteppedInHooks:
    """The common way to free each gradient early: one optimizer per parameter, stepped as its gradient arrives."""

    def __init__(self, params):
        self.param_groups = []
        self.state = {}
        for p in params:
            optimizer = adamw([p])
            self.state[p] = optimizer.state  # filled by its first step
            p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: self.consume(p, optimizer))

    def consume(self, p, optimizer):
        optimizer.step()
        p.grad = None

    def step(self): ...

    def zero_grad(self): ...


# The first is all activations at its peak (start of backward), the second all gradients (its end).
CASES = {
    "activations": (llama_config(), 128),
    "gradients": (llama_config(vocab=64, hidden=256), 8),
    "tied": (llama_config(tie_word_embeddings=True), 64),
    "checkpointed": (llama_config(), 256),
}


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("activations", "tied", "checkpointed")]


@pytest.mark.parametrize("case", ["gradients", *SLOW])
def test_fake_equals_real_equals_the_allocator(case):
    config, tokens = CASES[case]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if case == "checkpointed":
        model.gradient_checkpointing_enable()
    batch = llama_batch(config, tokens)

    predicted = step_memory(model, adamw, batch, fold=False)
    twin = copy.deepcopy(model)
    measured = measure_step(twin, adamw(twin.parameters()), batch)
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.resting_bytes == measured.resting_bytes
    assert predicted.at_peak() == measured.at_peak()
    assert predicted.peak_phase == measured.peak_phase

    optimizer = adamw(model.parameters())

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    above = peak_bytes(step)
    assert measured.peak_bytes - measured.resting_bytes == pytest.approx(above, rel=0.01)


def test_by_hand_on_one_linear():
    T, N, K = 8, 256, 128
    batch = {"x": torch.ones(T, K)}
    weights = N * K * 4

    def build():
        return nn.Linear(K, N, bias=False)

    def loss(model, batch):
        return model(batch["x"]).sum()

    memory = step_memory(build, adamw, batch, fold=False, loss=loss)
    states = 2 * weights + 4
    assert memory.resting_bytes == weights + states + T * K * 4
    peak = memory.timeline.live_bytes[:, CATEGORIES.index("gradients")].max()
    assert peak == weights
    # dW is made while Y is gone and only the loss, its gradient and the expanded dY (no storage) are left
    assert memory.peak_bytes == memory.resting_bytes + weights + 2 * 4
    assert {name: size for name, size in memory.at_peak().items() if size} == {
        "weights": weights,
        "states": states,
        "gradients": weights,
        "activations": T * K * 4 + 4,  # the batch, and the loss
        "temporary": 4,
    }
    assert memory.timeline.at(-1)["gradients"] == 0


def test_a_config_and_a_module_agree_and_weights_stay():
    config = llama_config(layers=2)
    batch = llama_batch(config, 32)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    from_module = step_memory(model, adamw, batch, fold=False)
    from_config = step_memory(config, adamw, batch, fold=False)
    assert from_module.peak_bytes == from_config.peak_bytes
    assert from_module.resting_bytes == from_config.resting_bytes
    for name, p in model.state_dict().items():
        assert type(p) is torch.Tensor and torch.equal(p, before[name])
    assert all(p.grad is None for p in model.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_nothing_of_the_models_size_is_allocated():
    """96 GiB of weights and as much again of gradients and twice of states: it would not fit here."""

    def build():
        return nn.Sequential(
            nn.Linear(2**18, 2**17, bias=False, dtype=torch.bfloat16),
            nn.Linear(2**17, 2**17, bias=False, dtype=torch.bfloat16),
        )

    memory = step_memory(
        build,
        adamw,
        torch.ones(4, 2**18, dtype=torch.bfloat16),
        fold=False,
        loss=lambda model, x: model(x).sum(),
    )
    weights = (2**18 + 2**17) * 2**17 * 2
    assert memory.at_peak()["weights"] == weights
    assert memory.peak_bytes > 4 * weights


@pytest.mark.slow
def test_gradients_consumed_in_hooks_are_labelled():
    config = llama_config(vocab=64, hidden=256, layers=3)
    batch = llama_batch(config, 8)
    plain = step_memory(config, adamw, batch, fold=False)
    hooked = step_memory(config, SteppedInHooks, batch, fold=False, label="hooks")
    column = CATEGORIES.index("gradients")
    largest = max(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters()) * 4
    most = hooked.timeline.live_bytes[:, column].max()
    assert largest <= most <= 3 * largest  # the three projections that share an input arrive together
    assert plain.timeline.live_bytes[:, column].max() == plain.at_peak()["weights"] - _buffer_bytes(config)
    assert hooked.peak_bytes < plain.peak_bytes - largest
    assert hooked.resting_bytes == plain.resting_bytes
    assert hooked.label == "hooks" and plain.label == "plain"


def test_as_dict_is_plain_json():
    import json

    memory = step_memory(llama_config(layers=1), adamw, llama_batch(llama_config(layers=1), 8), fold=False)
    report = json.loads(json.dumps(memory.as_dict()))
    assert sum(report["at_peak_bytes"].values()) == report["peak_bytes"] == memory.peak_bytes


def test_what_is_not_a_model_is_named():
    with pytest.raises(TypeError, match="model is a int: give a module"):
        step_memory(3, adamw, {}, fold=False)


def _buffer_bytes(config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(b.untyped_storage().nbytes() for b in model.buffers())
