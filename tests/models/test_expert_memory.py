"""No gradient of experts' weights exists: the memory of a step, measured and planned."""

import pytest
import torch

from tests.moe import SIZE
from tests.planner.test_folded_step import adamw, null_fold

transformers = pytest.importorskip("transformers")

MIB = 2**20


def wide(how, experts=8, **changes):
    """A Qwen3-MoE whose experts' gradients would be 12 MiB a layer in fp32."""
    config = transformers.Qwen3MoeConfig(
        **{**SIZE, "hidden_size": 256, "vocab_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 512,
           "intermediate_size": 64, "num_experts": experts, "num_experts_per_tok": 2, "head_dim": 32, **changes}
    )  # fmt: skip
    config._experts_implementation = how
    return config


@pytest.mark.parametrize("how", ["eager", pytest.param("grouped_mm", marks=pytest.mark.slow)])
def test_a_step_takes_scratch_memory_and_no_gradient(how):
    """Against the same fold with a step that does nothing."""
    config, ids = wide(how), torch.randint(0, 64, (1, 24))
    peaks = {}
    for name, fold in (("null", null_fold), ("folded", True)):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=how).train()
        peaks[name] = measured(model, ids, fold)
    hooked = 256 * 4
    assert 0 <= peaks["folded"] - peaks["null"] <= 8 * MIB + hooked
    assert 8 * MIB + hooked < 12 * MIB


def measured(model, ids, fold):
    from gradfold.planner.step import measure_step

    batch = {"input_ids": ids, "labels": ids}
    return measure_step(model, adamw(model.parameters()), batch, fold=fold).peak_bytes
