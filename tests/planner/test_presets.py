"""Presets against the numbers of parameters that their authors publish."""

import pytest

from gradfold.planner.models import find_subject
from gradfold.planner.presets import ALIASES, PRESETS, config_of, preset_of

pytest.importorskip("transformers")

# As the safetensors index of each model on the hub counts them, a tied head once.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-30b": 32_528_943_616,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "mistral-7b": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_preset_is_in_the_table():
    assert PARAMETERS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name):
    assert find_subject(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_found_by_its_hub_id_and_in_any_case(name):
    preset = PRESETS[name]
    assert preset_of(preset.hub) is preset
    assert preset_of(preset.hub.rpartition("/")[2].upper()) is preset
    assert preset_of(name.title()) is preset


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("google/gemma-3-1b-it", "gemma-3-1b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-360m"),
        ("smollm2", "smollm2-135m"),
    ],
)
def test_spellings(spelling, name):
    assert preset_of(spelling) is PRESETS[name]


@pytest.mark.parametrize(
    "name",
    [
        "mistralai/Mistral-7B-v0.1",
        "llama-2-34b",
        "qwen3-80b",
        "google/gemma-3-4b-it",
        "-instruct",
        "",
        "llama-3.1-8b-x",
    ],
)
def test_what_is_of_another_size_is_no_preset(name):
    assert preset_of(name) is None


def test_aliases_lead_somewhere():
    assert all(name in PRESETS for name in ALIASES.values())


def test_configs_are_bf16_and_keep_no_cache():
    config = config_of(PRESETS["gemma-2-2b"])
    assert str(config.dtype).removeprefix("torch.") == "bfloat16"
    assert config.use_cache is False
    assert config.tie_word_embeddings
