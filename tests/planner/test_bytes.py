"""Sizes as people write them."""

import pytest

from gradfold.planner.bytes import byte_unit, format_bytes, parse_budget, parse_bytes
from gradfold.planner.errors import PlanError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        (" 24 GiB ", 24 * GIB),
        ("24G", 24 * GIB),
        ("24 GB", 24 * 10**9),
        ("24000MiB", 24_000 * 2**20),
        ("0.5TiB", 2**39),
        ("1_000KB", 10**6),
        ("141e9", 141 * 10**9),
        ("1.5e3 kb", 1_500_000),
        ("512", 512),
        ("512 B", 512),
        (24 * GIB, 24 * GIB),
        (2.5e9, 2_500_000_000),
        (1e20, 10**20),
    ],
)
def test_parse(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "  ", "abc", "GiB", "0", 0, -1, "-24GiB", "24 GiBs", "24 XB", "1.2.3GiB", "24 GiB 1", "0.1", "nan", "inf",
     "1e999", True, False, None],
)  # fmt: skip
def test_what_is_no_size(text):
    with pytest.raises(PlanError, match="budget=.*give a size such as 24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["16", "0.5e1", " 24 ", "80.5"])
def test_a_budget_without_a_unit_is_asked_for_it(text):
    try:
        parse_budget(text)
    except PlanError as error:
        assert f"did you mean {text.strip()}GiB?" in str(error)
    else:
        assert "e" in text  # 5e0 is no word of people's


@pytest.mark.parametrize(("text", "nbytes"), [("16GiB", 16 * GIB), ("141e9", 141 * 10**9), ("17179869184", 16 * GIB)])
def test_budgets(text, nbytes):
    assert parse_budget(text) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1024, "1.00 KiB"),
        (2**20 - 100, "1.00 MiB"),
        (310 * 2**20, "310 MiB"),
        (1.25 * GIB, "1.25 GiB"),
        (60.08 * GIB, "60.1 GiB"),
        (1500 * GIB, "1500 GiB"),
        (9.999 * GIB, "10.0 GiB"),
    ],
)
def test_format(nbytes, text):
    assert format_bytes(nbytes) == text


def test_units():
    assert byte_unit(5 * GIB) == ("GiB", GIB)
    assert byte_unit(5) == ("B", 1)
