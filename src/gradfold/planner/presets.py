"""Shapes of published models, so that a plan needs neither a download nor a network.

What decides memory, as the models' own config.json files give it. `tests/planner/test_presets.py` holds each to the
number of parameters its authors publish.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A transformers config class, and what to make it with."""

    hub: str  # where the model is published
    kind: str
    options: dict[str, Any]


def _llama(hub: str, vocabulary: int, width: int, hidden: int, layers: int, heads: int, kv: int, **more: Any) -> Preset:
    return Preset(hub, "LlamaConfig", _sizes(vocabulary, width, hidden, layers, heads, kv) | more)


def _qwen3(size: str, width: int, hidden: int, layers: int, heads: int, tied: bool) -> Preset:
    options = _sizes(151_936, width, hidden, layers, heads, 8)
    tied_too = {"tie_word_embeddings": tied, "head_dim": 128, "max_position_embeddings": 40_960}
    return Preset(f"Qwen/Qwen3-{size}", "Qwen3Config", options | tied_too)


def _sizes(vocabulary: int, width: int, hidden: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }


def _gemma(hub: str, kind: str, width: int, hidden: int, layers: int, heads: int, kv: int, **more: Any) -> Preset:
    vocabulary = more.pop("vocabulary", 256_000)
    return Preset(
        hub, kind, _sizes(vocabulary, width, hidden, layers, heads, kv) | {"tie_word_embeddings": True} | more
    )


_LONG = {"max_position_embeddings": 131_072}
_LONG_TIED = _LONG | {"tie_word_embeddings": True}

PRESETS: dict[str, Preset] = {
    "llama-2-7b": _llama("meta-llama/Llama-2-7b-hf", 32_000, 4096, 11_008, 32, 32, 32, max_position_embeddings=4096),
    "llama-2-13b": _llama("meta-llama/Llama-2-13b-hf", 32_000, 5120, 13_824, 40, 40, 40, max_position_embeddings=4096),
    "llama-2-70b": _llama("meta-llama/Llama-2-70b-hf", 32_000, 8192, 28_672, 80, 64, 8, max_position_embeddings=4096),
    "llama-30b": _llama("huggyllama/llama-30b", 32_000, 6656, 17_920, 60, 52, 52, max_position_embeddings=2048),
    "llama-3.2-1b": _llama("meta-llama/Llama-3.2-1B", 128_256, 2048, 8192, 16, 32, 8, **_LONG_TIED),
    "llama-3.2-3b": _llama("meta-llama/Llama-3.2-3B", 128_256, 3072, 8192, 28, 24, 8, head_dim=128, **_LONG_TIED),
    "llama-3.1-8b": _llama("meta-llama/Llama-3.1-8B", 128_256, 4096, 14_336, 32, 32, 8, **_LONG),
    "llama-3.1-70b": _llama("meta-llama/Llama-3.1-70B", 128_256, 8192, 28_672, 80, 64, 8, **_LONG),
    "qwen3-0.6b": _qwen3("0.6B", 1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3("1.7B", 2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3("4B", 2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3("8B", 4096, 12_288, 36, 32, False),
    "qwen3-14b": _qwen3("14B", 5120, 17_408, 40, 40, False),
    "qwen3-32b": _qwen3("32B", 5120, 25_600, 64, 64, False),
    "gemma-2b": _gemma("google/gemma-2b", "GemmaConfig", 2048, 16_384, 18, 8, 1, head_dim=256),
    "gemma-7b": _gemma("google/gemma-7b", "GemmaConfig", 3072, 24_576, 28, 16, 16, head_dim=256),
    "gemma-2-2b": _gemma("google/gemma-2-2b", "Gemma2Config", 2304, 9216, 26, 8, 4, head_dim=256),
    "gemma-2-9b": _gemma("google/gemma-2-9b", "Gemma2Config", 3584, 14_336, 42, 16, 8, head_dim=256),
    "gemma-2-27b": _gemma("google/gemma-2-27b", "Gemma2Config", 4608, 36_864, 46, 32, 16, head_dim=128),
    "gemma-3-1b": _gemma(
        "google/gemma-3-1b-pt", "Gemma3TextConfig", 1152, 6912, 26, 4, 1, head_dim=256, vocabulary=262_144
    ),
    "mistral-7b": Preset(
        "mistralai/Mistral-7B-v0.3",
        "MistralConfig",
        _sizes(32_768, 4096, 14_336, 32, 32, 8) | {"sliding_window": None, "max_position_embeddings": 32_768},
    ),
    "smollm2-135m": _llama("HuggingFaceTB/SmolLM2-135M", 49_152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "smollm2-360m": _llama("HuggingFaceTB/SmolLM2-360M", 49_152, 960, 2560, 32, 15, 5, tie_word_embeddings=True),
    "smollm2-1.7b": _llama("HuggingFaceTB/SmolLM2-1.7B", 49_152, 2048, 8192, 24, 32, 32, tie_word_embeddings=True),
}

_ENDINGS = ("-hf", "-instruct", "-it", "-pt", "-base", "-chat", "-v0.3")  # Mistral v0.1 has another vocabulary
ALIASES = {"smollm2": "smollm2-135m", "llama-3-8b": "llama-3.1-8b", "llama-3-70b": "llama-3.1-70b"}


def preset_of(name: str) -> Preset | None:
    """The preset of a name: its own, its hub id's, with or without the organisation; upper and lower case are alike."""
    word = name.lower().rpartition("/")[2].removeprefix("meta-")
    while word not in PRESETS and word not in ALIASES:
        ending = next((ending for ending in _ENDINGS if word.endswith(ending)), None)
        if ending is None:
            return None
        word = word.removesuffix(ending)
    return PRESETS[ALIASES.get(word, word)]


def config_of(preset: Preset) -> Any:
    """The transformers config, in bf16 as these models are published."""
    import transformers

    return getattr(transformers, preset.kind)(**preset.options, dtype="bfloat16", use_cache=False)
