"""Small mixtures of experts of transformers: one layer each or two, wide enough that experts hold most parameters."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

V, H, T = 19, 16, 6  # vocabulary, width, tokens
SIZE = {
    "vocab_size": V,
    "hidden_size": H,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _causal(config, implementation):
    config._experts_implementation = implementation
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation).train()


def mixtral(how):
    config = transformers.MixtralConfig(
        **SIZE, num_hidden_layers=2, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2
    )
    return _causal(config, how)


def qwen3_moe(how):
    config = transformers.Qwen3MoeConfig(
        **SIZE,
        num_hidden_layers=2,
        moe_intermediate_size=12,
        intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return _causal(config, how)


def gpt_oss(how):
    config = transformers.GptOssConfig(
        **SIZE, num_hidden_layers=2, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    )
    return _causal(config, how)


def deepseek_v3(how):
    config = transformers.DeepseekV3Config(
        **{**SIZE, "head_dim": 4}, num_hidden_layers=2, intermediate_size=20, moe_intermediate_size=12,
        n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return _causal(config, how)


def llama4(how):
    config = transformers.Llama4TextConfig(
        **SIZE, num_hidden_layers=2, intermediate_size=12, intermediate_size_mlp=20, num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=1,
    )  # fmt: skip
    return _causal(config, "eager")  # it has its own way alone


def granite_moe(how):
    size = {key: value for key, value in SIZE.items() if key != "head_dim"}
    config = transformers.GraniteMoeConfig(
        **size, num_hidden_layers=2, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2
    )
    return _causal(config, how)


def olmoe(how):
    size = {key: value for key, value in SIZE.items() if key != "head_dim"}
    config = transformers.OlmoeConfig(
        **size, num_hidden_layers=2, intermediate_size=12, num_experts=8, num_experts_per_tok=2
    )
    return _causal(config, how)


MODELS = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "llama4": llama4,
    "granite_moe": granite_moe,
    "olmoe": olmoe,
}


def batch(step, rows=2, tokens=T):
    """Ids of a micro-batch; few enough that some experts see no token."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, V, (rows, tokens), generator=generator)


def loss_of(model, step):
    ids = batch(step)
    return model(input_ids=ids, labels=ids, use_cache=False).loss
