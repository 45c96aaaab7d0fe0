"""Canonical JSON: against an independent implementation, and what strict reading refuses."""

import json
import sys

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from gradfold.provenance import ProvenanceError, canonical_bytes, parse, sha256_hex
from gradfold.provenance import canonical as module
from tests.provenance.makers import SEEDS, read_seed

plain_text = st.text(st.characters(max_codepoint=0xD7FF))
"""Without letters beyond U+FFFF: RFC 8785 sorts keys by their UTF-16 halves, the published documents by code point."""


def alike(number):
    """Whether Python and ECMAScript write this float alike: no exponent, not whole."""
    return number != int(number) and "e" not in repr(number)


common = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False, width=64).filter(alike)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(plain_text, children, max_size=5),
    max_leaves=20,
)
any_text = st.text(st.characters(exclude_categories=["Cs"]))
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(any_text, children),
    max_leaves=20,
)


@given(common)
def test_it_is_rfc_8785_where_the_two_agree(value):
    assert canonical_bytes(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("name", SEEDS)
def test_it_is_rfc_8785_on_the_published_documents(name):
    assert canonical_bytes(read_seed(name)) == rfc8785.dumps(read_seed(name))


@given(anything)
def test_reading_gives_back_what_was_written(value):
    data = canonical_bytes(value)
    assert canonical_bytes(parse(data)) == data
    assert canonical_bytes(parse(json.dumps(value))) == data  # another spelling of the same


def test_the_form():
    value = {"é": [1, 1.0, True, None, -0.0], "a": {"\u2028": '\x7f\n"\\/'}, "": 10**30}
    expected = '{"":1000000000000000000000000000000,"a":{"\u2028":"\x7f\\n\\"\\\\/"},"é":[1,1.0,true,null,-0.0]}'
    assert canonical_bytes(value) == expected.encode()
    assert sha256_hex([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"


REFUSED = {
    "nothing": (b"", "is empty"),
    "white space": (b" \n\t", "is empty"),
    "no JSON": (b"{", "is not JSON (line 1, column 2"),
    "two values": (b"{} {}", "is not JSON (line 1, column 4: Extra data"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8 (byte 0)"),
    "a surrogate as bytes": (b'["\xed\xa0\x80"]', "is not UTF-8"),
    "a byte that is no text": (b'["\xff"]', "is not UTF-8 (byte 2)"),
    "NaN": (b"[NaN]", "holds NaN"),
    "Infinity": (b"[-Infinity]", "holds -Infinity"),
    "infinity in digits": (b"[1e999]", "holds 1e999, which is too large"),
    "a number without end": (b"[" + b"9" * 5000 + b"]", "holds a number of 5,000 digits"),
    "a key twice": (b'{"a": {"b": 1, "c": 2, "b": 1}}', "has the key 'b' twice"),
    "a key twice, spelled otherwise": (rb'{"a": 1, "\u0061": 1}', "has the key 'a' twice"),
    "half a pair": (rb'["\ud800"]', "half a surrogate pair"),
    "half a pair in a key": (rb'{"\uDFFF": 1}', "half a surrogate pair"),
    "the halves in the wrong order": (rb'["\udc00\ud800"]', "half a surrogate pair"),
    "depth": (b"[" * 102 + b"]" * 102, "is nested deeper than 100 levels"),
    "great depth": (b"[" * 1_000_000, "is nested deeper than 100 levels"),
    "great depth of objects": (b'{"a":' * 200_000, "is nested deeper than 100 levels"),
    "a line break in a string": (b'["a\nb"]', "is not JSON"),
    "a comma too many": (b"[1,]", "is not JSON"),
    "a comment": (b"[1] // one", "is not JSON"),
    "a plus sign": (b"[+1]", "is not JSON"),
    "a leading zero": (b"[01]", "is not JSON"),
    "digits of another script": ("[\u0661]".encode(), "is not JSON"),
    "single quotes": (b"['a']", "is not JSON"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_strict_reading(what):
    data, message = REFUSED[what]
    with pytest.raises(ProvenanceError) as caught:
        parse(data)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_whole_pair_is_text():
    assert parse(rb'["\ud83d\ude00"]') == ["\N{GRINNING FACE}"]


def test_limits(monkeypatch):
    monkeypatch.setattr(module, "MAX_SEPARATORS", 10)
    assert parse(b"[" + b"0," * 9 + b"0]") == [0] * 10
    with pytest.raises(ProvenanceError, match="more than 10 values"):
        parse(b"[" + b"0," * 11 + b"0]")
    monkeypatch.setattr(module, "MAX_BYTES", 5)
    with pytest.raises(ProvenanceError, match="is larger than"):
        parse(b"[1234]")


def test_integers_are_exact_up_to_the_limit():
    number = int("9" * module.MAX_DIGITS)
    assert parse(canonical_bytes([number])) == [number]


def circle():
    value = []
    value += [value, value]
    return value


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        {1: 2}, {None: 1}, {True: 1}, {"a": 1, 2: 3}, (1, 2), {1}, b"x", object(), float("nan"), float("inf"),
        "\ud800", {"\udc00": 1}, circle(), deep(200), deep(100_000), 10 ** (sys.get_int_max_str_digits() + 1),
        [{"a": (1,)}],
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_has_no_canonical_form(value):
    with pytest.raises(ProvenanceError):
        canonical_bytes(value)
