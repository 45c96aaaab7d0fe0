"""Models that are traced in a second: a few narrow layers of each kind."""

import numpy as np
import pytest

from tests.llama import small_llama

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(layers=2, **options):
    return small_llama(num_hidden_layers=layers, **{**SIZES, "dtype": "float32", **options})


def gemma2(layers=2, **options):
    more = {"head_dim": 16, "sliding_window": 8, "dtype": "float32", **options}
    return transformers.Gemma2Config(num_hidden_layers=layers, **{**SIZES, **more})


def gemma3(layers=2, **options):
    more = {"head_dim": 16, "sliding_window": 8, "dtype": "float32", **options}
    return transformers.Gemma3TextConfig(num_hidden_layers=layers, **{**SIZES, **more})


def qwen2_moe(layers=2, **options):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    more = {"shared_expert_intermediate_size": 32, "dtype": "float32", **experts, **options}
    return transformers.Qwen2MoeConfig(num_hidden_layers=layers, **{**SIZES, **more})


def differing(one, other):
    """What differs between two timelines, but for when their bytes were touched."""
    differs = [name for name in ("live_bytes", "deltas_bytes") if not _same(getattr(one, name), getattr(other, name))]
    if [(m.label, m.event) for m in one.moments] != [(m.label, m.event) for m in other.moments]:
        differs.append("moments")
    for name in ("op_of", "place_of"):
        said = ([getattr(timeline, name)(event) for event in range(len(timeline.ops))] for timeline in (one, other))
        if next(said) != next(said):
            differs.append(name)
    return differs


def _same(one, other):
    return one.shape == other.shape and bool(np.array_equal(one, other))
