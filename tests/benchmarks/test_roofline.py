"""The roofline: its bytes are those of the codecs, and its limits are where arithmetic puts them."""

import math

import pytest

pytest.importorskip("triton", reason="the launch table is the Triton backend's: pip install 'gradfold[gpu]'")

from benchmarks import roofline
from benchmarks.roofline import GPUS, StorageKind, WeightShape

KINDS = dict.fromkeys(roofline.STORAGE_KINDS, 70.0)


def test_bytes_per_element():
    """AdamW on bf16 weights: 2 + 2 * 4, and blocks of 128 with an fp32 scale each."""
    found = {kind.name: 2 * kind.stored_bytes for kind in KINDS}
    assert found == {"fp32": 20, "bf16": 12, "int8 + split8": 10.125, "int8": 8.125, "int4": 6.125}


def test_folding_saves_the_gradient_written_and_read():
    layer = WeightShape(4096, 1024, 3, 512, StorageKind("fp32"), 70)
    assert layer.separate_bytes - layer.folded_bytes == 2 * 2 * 3 * 4096 * 1024
    assert layer.flops == 3 * 2 * 512 * 4096 * 1024


@pytest.mark.parametrize("device", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_many_tokens_cost_what_the_product_costs(device, kind):
    for overlapped in (True, False):
        assert math.isclose(roofline.ratio(device, 2**24, kind, KINDS, overlapped, 0.8), 1.25, rel_tol=1e-3)


def test_one_token_costs_the_bytes():
    none = dict.fromkeys(KINDS, 0.0)
    ratio = roofline.ratio(GPUS["H100"], 1, StorageKind("fp32"), none, True)
    assert math.isclose(ratio, 20 / 24, rel_tol=2e-3)


def test_instructions_are_a_roof():
    layer = WeightShape(4096, 4096, 1, 128, StorageKind("int8"), 1000)
    device = GPUS["H200"]
    assert layer.folded_s(device, True, 0.8) == 1000 * 4096**2 / device.instructions_per_s


def test_crossing_is_where_the_ratio_passes_one():
    for overlapped in (True, False):
        for device in GPUS.values():
            tokens = roofline.crossing(device, StorageKind("int8"), KINDS, overlapped, 0.8)
            assert roofline.ratio(device, tokens, StorageKind("int8"), KINDS, overlapped, 0.8) > 1
            assert roofline.ratio(device, tokens - 64, StorageKind("int8"), KINDS, overlapped, 0.8) <= 1
