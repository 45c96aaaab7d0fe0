"""The roofline: its bytes are those of the codecs, and its limits are where arithmetic puts them."""

import math

import pytest

pytest.importorskip("triton", reason="the launch table is the Triton backend's: pip install 'gradfold[gpu]'")

from benchmarks import roofline
from benchmarks.roofline import FORGE, GPUS, Count, StorageKind, WeightShape
from gradfold.backends.triton import tile_configs

KINDS = dict.fromkeys(roofline.STORAGE_KINDS, Count(70.0, 30.0))
NONE = Count(0.0, 0.0)


def test_bytes_per_element():
    """AdamW on bf16 weights: 2 + 2 * 4, and blocks of 128 with an fp32 scale each."""
    found = {kind.name: 2 * kind.stored_bytes for kind in KINDS}
    assert found == {"fp32": 20, "bf16": 12, "int8 + split8": 10.125, "int8": 8.125, "int4": 6.125}


def test_folding_saves_the_gradient_written_and_read():
    layer = WeightShape(4096, 1024, 3, 512, StorageKind("fp32"), Count(70, 30))
    assert layer.separate_bytes - layer.folded_bytes == 2 * 2 * 3 * 4096 * 1024
    assert layer.flops == 3 * 2 * 512 * 4096 * 1024


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_many_tokens_cost_what_the_product_costs(device, kind):
    for overlapped in (True, False):
        assert math.isclose(roofline.ratio(device, 2**24, kind, KINDS, overlapped, 0.8), 1.25, rel_tol=1e-3)


def test_one_token_costs_the_bytes():
    none = dict.fromkeys(KINDS, NONE)
    ratio = roofline.ratio(GPUS["H100"], 1, StorageKind("fp32"), none, True)
    assert math.isclose(ratio, 20 / 24, rel_tol=2e-3)


@pytest.mark.parametrize("count, lanes", [(Count(1000, 10), 128), (Count(1000, 900), 64)], ids=["issue", "integer"])
def test_instructions_are_a_roof(count, lanes):
    layer = WeightShape(4096, 4096, 1, 128, StorageKind("int8"), count)
    device = GPUS["H200"]
    needed = count.all if lanes == 128 else count.integer
    assert layer.folded_s(device, True, 0.8) == pytest.approx(needed * 4096**2 / (lanes * 132 * 1.70e9))


def test_loads_that_come_from_memory_wait_longer():
    """132 multiprocessors with two programs of 16 sub-tiles: a tile of 128 x 128 each takes 16 times the wait."""
    layer = WeightShape(128 * 132, 256, 1, 1, StorageKind("int8"), NONE)  # as many tiles as programs
    pipes = layer.pipes_s(GPUS["H200"])
    assert pipes["latency"] == pytest.approx(16 * 200e-9) and pipes["latency without prefetch"] == pytest.approx(
        16 * 650e-9
    )


def test_the_fused_product_is_as_fast_as_was_measured():
    """With its speed, the model differs as FORGE's backward passes do: 8 ms of 4,096 tokens."""
    layers = roofline.model(FORGE.tokens, StorageKind("bf16"), KINDS)
    speed = roofline.measured_efficiency(KINDS)
    device = GPUS["H200"]
    behind = sum(layer.folded_s(device, True, speed) - layer.separate_s(device) for layer in layers)
    assert behind == pytest.approx(FORGE.fused_s - FORGE.separate_s, abs=0.3e-3)


def test_crossing_is_where_the_ratio_passes_one():
    for overlapped in (True, False):
        for device in GPUS.values():
            tokens = roofline.crossing(device, StorageKind("int8"), KINDS, overlapped)
            assert roofline.ratio(device, tokens, StorageKind("int8"), KINDS, overlapped) <= 1
            assert roofline.ratio(device, tokens + 64, StorageKind("int8"), KINDS, overlapped) > 1


def test_limits_that_were_measured_take_the_place_of_predicted_ones(monkeypatch):
    assert tile_configs.max_tokens(3) < tile_configs.max_tokens(10)
    monkeypatch.setitem(tile_configs.MEASURED_MAX_TOKENS, "blackwell", ((4.0, 100), (math.inf, 200)))
    assert [tile_configs.max_tokens(size, "blackwell") for size in (3, 4, 5)] == [100, 100, 200]
    assert tile_configs.max_tokens(4, "hopper") == tile_configs.max_tokens(4)
