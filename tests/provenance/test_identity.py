"""Pith numbers, short forms, aliases and times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradfold.provenance import ProvenanceError, is_number_of, pith_number, sha256_hex, short_number, source_aliases
from gradfold.provenance.identity import instant


def test_the_published_numbers(bundle, state):
    for number, record, aliases in (
        (bundle["pith_number"], bundle["canonical_record"], bundle["source_aliases"]),
        (state["pith_number"], state["current"]["canonical_record"], state["current"]["source_aliases"]),
    ):
        assert pith_number(record, 2026) == number
        assert is_number_of(number, record)
        assert not is_number_of(number, {**record, "schema_version": "1.1"})
        assert source_aliases(record, number, aliases[0]["created_at"]) == aliases
    assert short_number(bundle["pith_number"]) == bundle["short_pith_number"] == "pith:GWT7BTE6"
    assert short_number(bundle["pith_number"], 12) == "pith:GWT7BTE6QQH6"
    assert sha256_hex(bundle["canonical_record"]) == bundle["canonical_sha256"]


@pytest.mark.parametrize(
    "number",
    [None, 5, "", "pith:2026:", "pith:2026:gwt7bte6qqh6qfvv76twp23rsf", "pith:26:GWT7BTE6QQH6QFVV76TWP23RSF",
     "pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF\n", "pith:2026:GWT7BTE6QQH6QFVV76TWP23RS1",
     "pith:\u0662026:GWT7BTE6QQH6QFVV76TWP23RSF"],
)  # fmt: skip
def test_what_is_no_number(number):
    assert not is_number_of(number, {})
    with pytest.raises(ProvenanceError):
        short_number(number)


@pytest.mark.parametrize("year", [-1, 10_000, "2026", True, 2026.0])
def test_what_is_no_year(year):
    with pytest.raises(ProvenanceError, match="year"):
        pith_number({}, year)


@pytest.mark.parametrize("source", [None, [], {}, {"kind": "arxiv"}, {"kind": 1, "id": 2}, {"kind": "book", "id": "x"}])
def test_aliases_of_other_sources(source):
    aliases = source_aliases({"source": source}, "pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF", "")
    kinds = [alias["alias_kind"] for alias in aliases]
    assert kinds == (["book"] if source and "book" in source.values() else []) + [
        "pith_short_12", "pith_short_16", "pith_short_8"
    ]  # fmt: skip


def test_times_sort_as_instants():
    times = ["2026-05-21T01:05:41Z", "2026-05-21T01:05:41.000001Z", "2026-05-21T01:05:41.5Z", "2026-05-21T01:05:42Z"]
    assert sorted(times, key=instant) == times
    assert sorted(times) != times  # as text, the whole second would come last
    assert instant("2026-05-21T01:05:41Z") == instant("2026-05-21T01:05:41.0Z")


@pytest.mark.parametrize(
    "text",
    [None, 1, "", "2026-05-21", "2026-05-21T01:05:41", "2026-05-21 01:05:41Z", "2026-02-29T00:00:00Z",
     "2026-13-01T00:00:00Z",
     "2026-05-21T24:00:00Z", "2026-05-21T01:05:60Z", "0000-01-01T00:00:00Z", "2026-05-21T01:05:41+00:00",
     "2026-05-21T01:05:41Z\n"],
)  # fmt: skip
def test_what_is_no_time(text):
    assert instant(text) is None


@given(st.datetimes())
def test_every_moment_is_a_time(moment):
    assert instant(moment.isoformat() + "Z")
