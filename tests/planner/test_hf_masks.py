"""What transformers decides by looking at values is answered from the real batch."""

import copy

import pytest
import torch

from gradfold.planner.step import measure_step, step_memory
from tests.llama import small_llama

transformers = pytest.importorskip("transformers")


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def batch_with(kind):
    ids = torch.randint(0, 512, (2, 96))
    batch = {"input_ids": ids, "labels": ids}
    if kind == "all ones":
        batch["attention_mask"] = torch.ones_like(ids)
    elif kind == "padded":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, 50:] = 0
    elif kind == "positions":
        batch["position_ids"] = torch.arange(96).expand(2, -1)
    elif kind == "packed":
        batch["position_ids"] = torch.arange(48).repeat(2).expand(2, -1)
    return batch


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("no mask", "all ones", "positions")]


@pytest.mark.parametrize("kind", ["padded", "packed", *SLOW])
def test_fake_peak_equals_real_peak(kind):
    config = small_llama(num_hidden_layers=2, use_cache=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    batch = batch_with(kind)
    original = transformers.masking_utils.find_packed_sequence_indices
    predicted = step_memory(model, adamw, batch, fold=False)
    assert transformers.masking_utils.find_packed_sequence_indices is original
    twin = copy.deepcopy(model)
    measured = measure_step(twin, adamw(twin.parameters()), batch)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.003)
