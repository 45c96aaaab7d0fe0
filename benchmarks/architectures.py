"""Small models of many architectures, with random weights, and a loss for each.

Widths are small and layers few, but weights have the proportions of real models: matrices are larger than vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

V, H, T = 96, 32, 12  # vocabulary, width, tokens
_TEXT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_CAUSAL: dict[str, Any] = _TEXT | {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": V, "d_model": H, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

Loss = Callable[[Any, int], Tensor]


def _ids(step: int, length: int = T) -> Tensor:
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(step))


def _noise(model: nn.Module, step: int, *shape: int) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return made.to(next(model.parameters()).dtype)


def _language(model: Any, step: int) -> Tensor:
    return model(input_ids=_ids(step), labels=_ids(step)).loss


def _squares(output: Any) -> Tensor:
    """The mean square of everything floating that a model returns, so that all of it has a gradient."""
    found = output if isinstance(output, (list, tuple)) else output.values() if hasattr(output, "values") else [output]
    floats = [one for one in found if isinstance(one, Tensor) and one.is_floating_point() and one.requires_grad]
    return torch.stack([one.square().mean() for one in floats]).sum()


def _pixels(size: int = 32) -> Loss:
    return lambda model, step: _squares(model(pixel_values=_noise(model, step, 2, 3, size, size)))


def _waves(model: Any, step: int) -> Tensor:
    return _squares(model(_noise(model, step, 2, 1600)))


def _whisper(model: Any, step: int) -> Tensor:
    return model(input_features=_noise(model, step, 2, 8, 64), labels=_ids(step)).loss


def _clip(model: Any, step: int) -> Tensor:
    ids = _ids(step)
    ids[:, -1] = 2
    return model(input_ids=ids, pixel_values=_noise(model, step, 2, 3, 32, 32), return_loss=True).loss


def _detr() -> Any:
    import transformers as t

    body: dict[str, Any] = {
        "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic",
        "out_features": ["stage2"],
    }  # fmt: skip
    whole: dict[str, Any] = {
        "use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "d_model": H,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 8, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    backbone: Any = t.ResNetConfig(**body)
    return t.DetrModel(t.DetrConfig(backbone_config=backbone, **whole))


def _transformers(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return make


def _clip_model() -> Any:
    import transformers as t

    text, vision = {**_TEXT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}, _VISION
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=H))


def _diffusers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, kind)(**options)

    return make


def _denoise(channels: int, size: int, **more: Callable[[Any, int], Tensor]) -> Loss:
    def loss(model: Any, step: int) -> Tensor:
        named = {name: value(model, step) for name, value in more.items()}
        noisy = _noise(model, step, 2, channels, size, size)
        return model(noisy, timestep=torch.tensor([3, 7]), **named).sample.square().mean()

    return loss


def _flux(model: Any, step: int) -> Tensor:
    places = torch.zeros(T, 3)
    found = model(
        hidden_states=_noise(model, step, 2, T, 4), encoder_hidden_states=_noise(model, step, 2, 6, H),
        pooled_projections=_noise(model, step, 2, H), timestep=_noise(model, step, 2), img_ids=places,
        txt_ids=torch.zeros(6, 3),
    )  # fmt: skip
    return found.sample.square().mean()


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.embed, self.core, self.head = nn.Embedding(V, H), kind(H, H, 2, batch_first=True), nn.Linear(H, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.core(self.embed(ids))[0])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _cross(model: Any, step: int) -> Tensor:
    return nn.functional.cross_entropy(model(_ids(step)).flatten(0, 1), _ids(step).flatten())


_UNET: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, tuple[Callable[[], nn.Module], Loss]]] = {
    "decoders": {
        "llama": (_transformers("LlamaForCausalLM", "LlamaConfig", **_CAUSAL), _language),
        "qwen3": (_transformers("Qwen3ForCausalLM", "Qwen3Config", **_CAUSAL, head_dim=16), _language),
        "gemma2": (_transformers("Gemma2ForCausalLM", "Gemma2Config", **_CAUSAL, head_dim=16), _language),
        "gemma3": (_transformers("Gemma3ForCausalLM", "Gemma3TextConfig", **_CAUSAL, head_dim=16), _language),
        "gpt2": (
            _transformers("GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_embd=H, n_layer=2, n_head=2, n_positions=64),
            _language,
        ),
        "falcon": (
            _transformers(
                "FalconForCausalLM", "FalconConfig", vocab_size=V, hidden_size=H, num_hidden_layers=2,
                num_attention_heads=2,
            ),
            _language,
        ),
        "opt": (
            _transformers(
                "OPTForCausalLM", "OPTConfig", vocab_size=V, hidden_size=H, ffn_dim=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=H,
            ),
            _language,
        ),
        "biogpt": (_transformers("BioGptForCausalLM", "BioGptConfig", **_TEXT), _language),
        "bloom": (
            _transformers("BloomForCausalLM", "BloomConfig", vocab_size=V, hidden_size=H, n_layer=2, n_head=2),
            _language,
        ),
        "mamba": (
            _transformers(
                "MambaForCausalLM", "MambaConfig", vocab_size=V, hidden_size=H, num_hidden_layers=2, state_size=8
            ),
            _language,
        ),
    },
    "experts": {
        "mixtral": (_transformers("MixtralForCausalLM", "MixtralConfig", **_CAUSAL, **_MOE), _language),
        "qwen3_moe": (
            _transformers(
                "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_CAUSAL, num_experts=4, num_experts_per_tok=2,
                moe_intermediate_size=32, head_dim=16,
            ),
            _language,
        ),
        "gpt_oss": (
            _transformers("GptOssForCausalLM", "GptOssConfig", **_CAUSAL, **_MOE, head_dim=16, sliding_window=8),
            _language,
        ),
        "deepseek_v3": (
            _transformers(
                "DeepseekV3ForCausalLM", "DeepseekV3Config", **(_CAUSAL | {"num_key_value_heads": 2}),
                n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1,
                first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
                v_head_dim=16,
            ),
            _language,
        ),
        "llama4_text": (
            _transformers(
                "Llama4ForCausalLM", "Llama4TextConfig", **_CAUSAL, head_dim=16, num_local_experts=4,
                num_experts_per_tok=1, interleave_moe_layer_step=1, intermediate_size_mlp=64,
            ),
            _language,
        ),
        "granitemoe": (_transformers("GraniteMoeForCausalLM", "GraniteMoeConfig", **_CAUSAL, **_MOE), _language),
        "olmoe": (
            _transformers(
                "OlmoeForCausalLM", "OlmoeConfig", **_CAUSAL, num_experts=4, num_experts_per_tok=2
            ),
            _language,
        ),
    },
    "encoders, and encoders with decoders": {
        "bert": (_transformers("BertForMaskedLM", "BertConfig", **_TEXT), _language),
        "t5": (
            _transformers(
                "T5ForConditionalGeneration", "T5Config", vocab_size=V, d_model=H, d_kv=16, d_ff=64, num_layers=2,
                num_heads=2, decoder_start_token_id=0,
            ),
            _language,
        ),
        "bart": (_transformers("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ), _language),
        "m2m100": (_transformers("M2M100ForConditionalGeneration", "M2M100Config", **_SEQ2SEQ), _language),
        "whisper": (
            _transformers(
                "WhisperForConditionalGeneration", "WhisperConfig", **(_SEQ2SEQ | {"max_position_embeddings": 64}),
                num_mel_bins=8, max_source_positions=32, max_target_positions=64, begin_suppress_tokens=None,
            ),
            _whisper,
        ),
    },
    "images, sound": {
        "vit": (_transformers("ViTModel", "ViTConfig", **_VISION), _pixels()),
        "dinov2": (_transformers("Dinov2Model", "Dinov2Config", **_VISION), _pixels()),
        "swin": (
            _transformers(
                "SwinModel", "SwinConfig", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
                window_size=4,
            ),
            _pixels(),
        ),
        "segformer": (
            _transformers(
                "SegformerModel", "SegformerConfig", hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1],
                num_attention_heads=[1, 1, 2, 2],
            ),
            _pixels(64),
        ),
        "convnext": (
            _transformers("ConvNextModel", "ConvNextConfig", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1]),
            _pixels(64),
        ),
        "resnet": (
            _transformers("ResNetModel", "ResNetConfig", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
            _pixels(),
        ),
        "detr": (_detr, _pixels(64)),
        "clip": (_clip_model, _clip),
        "hubert": (
            _transformers(
                "HubertModel", "HubertConfig", **{k: v for k, v in _TEXT.items() if k != "max_position_embeddings"},
                conv_dim=[32, 32, 32], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3], num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
            ),
            _waves,
        ),
    },
    "diffusion (diffusers)": {
        "dit": (
            _diffusers(
                "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2,
                sample_size=8, patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
            ),
            _denoise(4, 8, class_labels=lambda model, step: torch.tensor([1, 2])),
        ),
        "flux": (
            _diffusers(
                "FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
                attention_head_dim=16, num_attention_heads=2, joint_attention_dim=H, pooled_projection_dim=H,
                axes_dims_rope=(4, 4, 8),
            ),
            _flux,
        ),
        "sd3": (
            _diffusers(
                "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=2,
                attention_head_dim=16, num_attention_heads=2, joint_attention_dim=H, caption_projection_dim=H,
                pooled_projection_dim=H, out_channels=4, pos_embed_max_size=8,
            ),
            _denoise(
                4, 8, encoder_hidden_states=lambda model, step: _noise(model, step, 2, 6, H),
                pooled_projections=lambda model, step: _noise(model, step, 2, H),
            ),
        ),
        "unet_2d_condition": (
            _diffusers(
                "UNet2DConditionModel", **_UNET, cross_attention_dim=H, attention_head_dim=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            _denoise(4, 8, encoder_hidden_states=lambda model, step: _noise(model, step, 2, 6, H)),
        ),
        "unet_2d": (
            _diffusers(
                "UNet2DModel", **_UNET, in_channels=3, out_channels=3, attention_head_dim=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ),
            _denoise(3, 8),
        ),
        "vae": (
            _diffusers(
                "AutoencoderKL", block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            ),
            lambda model, step: model(_noise(model, step, 2, 3, 16, 16)).sample.square().mean(),
        ),
    },
    "torch.nn": {
        "Transformer": (
            lambda: nn.Transformer(H, 2, 1, 1, 64, dropout=0.0, batch_first=True),
            lambda model, step: model(_noise(model, step, 2, T, H), _noise(model, step, 2, 6, H)).square().mean(),
        ),
        "MultiheadAttention": (
            _Attention,
            lambda model, step: model(_noise(model, step, 2, T, H)).square().mean(),
        ),
        "LSTM": (lambda: _Recurrent(nn.LSTM), _cross),
        "GRU": (lambda: _Recurrent(nn.GRU), _cross),
        "RNN": (lambda: _Recurrent(nn.RNN), _cross),
    },
}  # fmt: skip
"""By kind and name: what makes the model, and its loss in a step."""
