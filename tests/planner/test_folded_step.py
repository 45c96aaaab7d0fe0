"""The memory of a folded step: predicted as measured, no gradient stored, and what folding itself may cost."""

import copy

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import Backend
from gradfold.planner.step import measure_step, step_memory
from tests.llama import small_llama

transformers = pytest.importorskip("transformers")

MIB = 2**20


class NullBackend(Backend):
    """Consumes every gradient and changes nothing."""

    name = "null"

    def prepare(self, weight, states, rule, group):
        return lambda terms, numbers, change: 0.0


def null_fold(model, optimizer):
    return gradfold.fold(model, optimizer, backend=NullBackend())


def adamw(params):
    return gradfold.AdamW(params, lr=1e-3)


def torch_adamw(params):
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def llama_config(layers, hidden=256, vocab=512, **kwargs):
    return small_llama(vocab, hidden, layers, intermediate_size=8 * hidden // 3, use_cache=False, **kwargs)


def batch_of(config, tokens):
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["untied", "tied", "checkpointed"])
def test_fake_equals_real(dtype, kind):
    config = llama_config(3, tie_word_embeddings=kind == "tied")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(config, 48)
    predicted = step_memory(model, adamw, batch)
    twin = copy.deepcopy(model)
    measured = measure_step(twin, adamw(twin.parameters()), batch, fold=True)
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.resting_bytes == measured.resting_bytes
    assert predicted.at_peak() == measured.at_peak()
    assert predicted.label == "folded"


def test_no_gradient_of_a_folded_weight_is_ever_stored():
    config = llama_config(4, hidden=384)
    batch = batch_of(config, 16)
    plain = step_memory(config, torch_adamw, batch, fold=False)
    folded = step_memory(config, adamw, batch)
    norm_bytes = config.hidden_size * 4
    assert folded.most_bytes("gradients") == norm_bytes  # the hooked ones, one at a time
    assert plain.most_bytes("gradients") > 1000 * norm_bytes
    assert folded.at_peak()["states"] == pytest.approx(plain.at_peak()["states"], rel=1e-3)
    assert folded.peak_bytes < plain.peak_bytes - 0.7 * plain.most_bytes("gradients")


def test_the_fold_is_removed_again():
    model = nn.Linear(64, 64)
    optimizer = adamw(model.parameters())
    measure_step(model, optimizer, torch.ones(4, 64), fold=True, loss=lambda model, x: model(x).sum())
    assert type(model) is nn.Linear
    model(torch.ones(1, 64)).sum().backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize(
    ("dtype", "tied", "tokens"),
    [
        pytest.param(torch.float32, False, 256, marks=pytest.mark.slow),  # activations set the peak
        (torch.float32, True, 16),  # the step does
        pytest.param(torch.bfloat16, False, 256, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, 16, marks=pytest.mark.slow),
    ],
)
def test_folding_a_100m_llama_costs_at_most_10_mib(dtype, tied, tokens):
    """Against the same fold with a step that does nothing. Few wide layers: quick to trace, and the harder case."""
    config = llama_config(3, hidden=1536, vocab=10_240, tie_word_embeddings=tied)

    def build():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()

    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) >= 100e6
    largest_hooked = max(p.numel() * p.element_size() for name, p in model.named_parameters() if "norm" in name)
    null = step_memory(build, adamw, batch_of(config, tokens), fold=null_fold)
    folded = step_memory(build, adamw, batch_of(config, tokens))
    assert 0 <= folded.peak_bytes - null.peak_bytes <= 10 * MIB + largest_hooked


@pytest.mark.slow
def test_skipped_writes_change_no_figure(monkeypatch):
    config = llama_config(2)
    batch = batch_of(config, 32)
    quick = step_memory(config, adamw, batch)
    monkeypatch.setattr("gradfold.planner.fake._written_argument", lambda func: -1)
    slow = step_memory(config, adamw, batch)
    assert (quick.timeline.live_bytes == slow.timeline.live_bytes).all()
    assert (quick.timeline.touched_bytes == slow.timeline.touched_bytes).all()
    assert quick.as_dict() == slow.as_dict()
