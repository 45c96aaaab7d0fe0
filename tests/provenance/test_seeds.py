"""The two published documents verify, merge to their own states, and no leaf of either can change unseen."""

import pytest

from gradfold.provenance import ProvenanceError, Status, TrustStore, merge, parse, verify
from tests.provenance.makers import SEEDS, at, changed, leaves, read_seed, seed_bytes


@pytest.mark.parametrize("name", SEEDS)
def test_a_published_document_verifies(name):
    report = verify(read_seed(name))
    assert report.verified, report.failures
    assert report.subject == read_seed(name)["pith_number"]


def test_the_bundle_is_signed_throughout(bundle):
    report = verify(bundle)
    signed = [check.where for check in report.checks if check.name.endswith("signature") and check.status == "pass"]
    assert signed == ["events[0]", "events[0]", "events[1]", "bundle"]
    assert report.trusted_signatures == 4
    assert report.verdict == "verified"


def test_the_state_has_its_receipt_and_says_what_it_lacks(state):
    report = verify(state)
    assert report.trusted_signatures == 1
    lacking = [(check.where, check.name) for check in report.checks if check.status is Status.NOT_PRESENT]
    assert lacking == [("current.record_created", "signature"), ("current.graph_snapshots[0]", "signature")]
    assert report.verdict == "verified; 2 events stand on the state's word alone"


@pytest.mark.parametrize("name", SEEDS)
def test_what_nobody_can_check_is_said(name):
    unchecked = {check.name for check in verify(read_seed(name)).checks if check.status is Status.NOT_CHECKED}
    assert unchecked >= {"snapshot_sha256", "abstract_canon_sha256"}
    titles = [check for check in verify(read_seed(name)).checks if check.name == "title_canon_sha256"]
    assert [check.status for check in titles] == ["pass"]


def test_merging_gives_the_published_state(bundle, state):
    assert merge([bundle]) == bundle["state"]
    assert merge([bundle["state"], bundle]) == bundle["state"]
    assert merge([state]) == state
    assert merge(bundle["events"]) == bundle["state"]  # single events, checked with the built-in key


def test_nothing_is_trusted_but_what_the_store_holds(bundle, state):
    report = verify(bundle, TrustStore(()))
    assert not report.verified and not report.failures
    assert {check.name for check in report.untrusted} == {"signature", "receipt_signature", "bundle_signature"}
    assert all("valid signature, untrusted key" in check.detail for check in report.untrusted)
    assert verify(state, TrustStore(())).verdict == "valid signature, untrusted key"


def other(value):
    """A value as near as can be: one letter, one unit, or something where there was nothing."""
    if isinstance(value, str) and value:
        return value[:-1] + chr(ord(value[-1]) ^ 1)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return {type(None): 0, str: "x", list: [0], dict: {"": 0}}[type(value)]


@pytest.mark.parametrize("name", SEEDS)
def test_a_change_of_any_leaf_is_detected(name):
    document = read_seed(name)
    paths = list(leaves(document))
    assert len(paths) > 70
    unseen = [path for path in paths if verify(changed(document, path, other(at(document, path)))).verified]
    assert not unseen


@pytest.mark.parametrize("name", SEEDS)
def test_a_leaf_that_goes_is_detected(name):
    document = read_seed(name)
    for path in leaves(document):
        damaged = changed(document, path, None)
        holder = at(damaged, path[:-1])
        del holder[path[-1]]
        assert not verify(damaged).verified, path


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
def test_a_change_of_any_byte_is_detected(name):
    """Every byte of the file, each with one bit flipped: no JSON any more, or a document that fails."""
    data = seed_bytes(name)
    for place in range(len(data)):
        for bit in (1, 32):  # the letter beside it, and the other case
            damaged = bytearray(data)
            damaged[place] ^= bit
            try:
                verified = verify(parse(bytes(damaged))).verified
            except ProvenanceError:
                continue
            assert not verified, (place, bit)
