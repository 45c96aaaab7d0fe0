"""No gradient of experts' weights exists: the memory of a step, measured and planned."""

import pytest
import torch

import gradfold
from gradfold.planner.step import measure_step
from tests.moe import SIZE
from tests.planner.test_folded_step import adamw, null_fold

transformers = pytest.importorskip("transformers")

MIB = 2**20


def peak_of(how, fold):
    """Bytes at the peak of a step of a Qwen3-MoE, whose experts' gradients would be 12 MiB a layer."""
    sizes = {"hidden_size": 256, "vocab_size": 64, "head_dim": 32, "moe_intermediate_size": 512}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**SIZE, **sizes, **experts})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=how).train()
    ids = torch.randint(0, 64, (1, 24))
    batch = {"input_ids": ids, "labels": ids}
    return measure_step(model, adamw(model.parameters()), batch, fold=fold).peak_bytes


@pytest.mark.parametrize(
    "how", ["grouped_mm", *(pytest.param(how, marks=pytest.mark.slow) for how in ("eager", "batched_mm"))]
)
def test_a_step_takes_scratch_memory_and_no_gradient(how):
    """Against the same fold with a step that does nothing; the largest hooked gradient is that of a norm."""
    assert 0 <= peak_of(how, True) - peak_of(how, null_fold) <= 8 * MIB + 256 * 4


@pytest.mark.slow
def test_qwen3_30b_a3b_is_planned_without_a_gradient():
    """A layer's experts would have gradients of 1.1 GiB in bf16; the largest there is belongs to a router."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    memory = gradfold.plan(config, batch=1, tokens=256, baselines=False).predicted.memory
    peak = memory.at_peak()
    assert memory.most_bytes("gradients") <= 8 * MIB
    assert peak["weights"] == pytest.approx(30.5e9 * 2, rel=0.01)
    assert sum(peak.values()) - peak["weights"] - peak["states"] - peak["activations"] <= 32 * MIB
