"""What benchmarks/gpu lets a card's approximate instructions change, and what not."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.kernel import Cell
from benchmarks.gpu.suites import correctness
from benchmarks.gpu.suites.correctness import Example, codes_apart


def pair(dtype="bf16", **options):
    """Two equal cells."""
    options = {"lr": 1e-3, "small_size": 0, "states": "int8", **options}
    made = Cell(correctness.RULES["adamw"][0], (8, 256), correctness.DTYPES[dtype], options)
    return made, made.to("cpu")


def test_equal_bits_pass():
    assert correctness._other_bits(Example(states="int8"), *pair()) == (0.0, "")


CHANGES = [
    ("bf16", "int8", "exp_avg.codes", 1, ""),
    ("bf16", "int8", "exp_avg.codes", 2, "exp_avg.codes are up to 2 codes apart"),
    ("bf16", "int8", "exp_avg_sq.codes", 1, "exp_avg_sq.codes differ"),
    ("bf16", "int8", "exp_avg.scales", 1, "exp_avg.scales differ"),
    ("bf16", "int4", "exp_avg.codes", 1, ""),
    ("bf16", "bf16", "exp_avg", 1, "exp_avg differ"),
    ("fp32", "int8", "exp_avg.codes", 1, "exp_avg.codes differ"),
    ("bf16", "int8", "weight", 1, ""),
    ("bf16", "int8", "weight", 3, "more than a unit apart"),
]


@pytest.mark.parametrize(("dtype", "states", "where", "steps", "wrong"), CHANGES)
def test_one_element_may_be_a_unit_or_a_code_away_and_nothing_else(dtype, states, where, steps, wrong):
    found, wanted = pair(dtype, states=states)
    tensor = found.whole.detach() if where == "weight" else found.state[where]
    bits = correctness._ints(tensor)  # the same memory
    flat = bits.view(-1)
    flat[int((flat.int() & 15).clamp(2, 4).ne(flat.int() & 15).logical_not().nonzero()[0])] += steps
    assert wrong in correctness._other_bits(Example(dtype=dtype, states=states), found, wanted)[1]
    assert wrong or correctness._other_bits(Example(dtype=dtype, states=states), found, wanted)[1] == ""


def test_many_codes_a_step_away_are_wrong():
    found, wanted = pair()
    found.state["exp_avg.codes"][0] ^= 1
    assert "of exp_avg.codes differ, where" in correctness._other_bits(Example(states="int8"), found, wanted)[1]


def test_codes_of_four_bits_are_compared_by_halves():
    def packed(low, high):
        return torch.tensor([(low & 15) | ((high & 15) << 4)], dtype=torch.uint8)

    assert codes_apart(packed(-7, 3), packed(-7, 3), 4) == 0
    assert codes_apart(packed(-7, 3), packed(-6, 3), 4) == 1
    assert codes_apart(packed(-1, 3), packed(1, -1), 4) == 4
    assert codes_apart(torch.tensor([-3], dtype=torch.int8), torch.tensor([2], dtype=torch.int8), 8) == 5
