"""Merging as a join: any order, any grouping, any repetition, by way of bundles, states or single events."""

import copy
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradfold import provenance
from gradfold.provenance import ProvenanceError, PublicKey, Signer, TrustStore, sha256_hex, verify
from gradfold.provenance.events import LISTS
from tests.provenance.makers import REGISTRIES, TIME, bundle_of, changed, event, record_event, resign, signer

ADA, BOB, EVE = signer("ada", 1), signer("bob", 2), signer("eve", 3)


def merge(documents, store=REGISTRIES):
    """Merge for one who knows ada and bob as registries."""
    return provenance.merge(documents, store)


def pool_of_events():
    """Good events and bad, forks, chains, several records, the same event with another signature's time."""
    first = event(ADA, {"n": 1})
    fork = event(ADA, {"n": 2})
    settled = event(BOB, {"n": 1}, target="settled")
    unkept = resign(ADA, {**event(ADA, {"n": 3}), "schema_version": "2.0"})
    later = copy.deepcopy(first)
    later["signature"]["signed_at"] = "2026-09-09T09:09:09Z"
    return [
        record_event(ADA),
        record_event(ADA, created_at="2026-07-02T00:00:00Z"),
        record_event(BOB, created_at="2026-06-30T23:59:59.5Z"),
        first,
        fork,
        later,
        event(ADA, {"n": 4}, prev_event=first["event_id"]),
        event(BOB, {"n": 1}),
        settled,
        event(BOB, {"n": 2}, target="settled", supersedes=[settled["event_id"]]),
        event(EVE, {"n": 2}, target="settled", supersedes=[first["event_id"], fork["event_id"]]),
        event(EVE, {}, event_type="correction", created_at="2026-07-01T00:00:00.000001Z"),
        changed(first, ("payload", "n"), 9),
        changed(first, ("signature", "signature_b64"), "A" * 86 + "=="),
        changed(fork, ("event_id",), first["event_id"]),
        changed(fork, ("signature",), None),
        unkept,
        event(ADA, {}, subject="pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF"),
        None,
        17,
        [],
        {},
    ]


EVENTS = pool_of_events()
KEYS = [(ADA, BOB, EVE), (ADA,), (ADA, BOB), (EVE,)]


@st.composite
def documents(draw):
    """A bundle of some events, with some of the keys; or its state; or one event alone."""
    events = draw(st.lists(st.sampled_from(EVENTS), max_size=8))
    bundle = bundle_of(ADA, events, keys=draw(st.sampled_from(KEYS)))
    kind = draw(st.sampled_from(["bundle", "bundle", "state", "event"]))
    single = [
        found
        for found in events
        if isinstance(found, dict) and found and found["subject_pith_number"] == bundle["pith_number"]
    ]
    if kind == "event" and single:
        return single[0]
    return bundle["state"] if kind == "state" else bundle


some = st.lists(documents(), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(some, st.randoms(use_true_random=False))
def test_any_order(found, order):
    expected = merge(found)
    turned = list(found)
    order.shuffle(turned)
    assert merge(turned) == expected
    assert merge([copy.deepcopy(turned[0]), *turned, *found]) == expected  # and any repetition


@settings(deadline=None, max_examples=60)
@given(documents(), documents(), documents())
def test_any_grouping(one, two, three):
    """Also by way of states, which carry neither signatures nor keys."""
    expected = merge([one, two, three])
    assert merge([merge([one, two]), three]) == expected
    assert merge([one, merge([two, three])]) == expected
    assert merge([merge([one]), merge([two]), merge([three])]) == expected
    assert merge([expected]) == expected
    assert merge([expected, two]) == expected


@settings(deadline=None, max_examples=40)
@given(some)
def test_the_state_is_everyones(found):
    """Whom one trusts changes what verification says, not what merging gives (single events need a key, though)."""
    found = [document for document in found if "event_type" not in document]
    if found:
        store = TrustStore((ADA.public, PublicKey(BOB.public.raw), Signer(EVE.private, ADA.key_id + "x", "x").public))
        assert merge(found, store) == merge(found, TrustStore()) == merge(found, TrustStore(()))


@settings(deadline=None, max_examples=40)
@given(some)
def test_a_state_counts_what_it_holds(found):
    state = merge(found)
    assert state["state_sha256"] == sha256_hex({k: v for k, v in state.items() if k != "state_sha256"})
    ids = state["applied_event_ids"]
    assert len(set(ids)) == len(ids) == state["valid_event_count"]
    current = state["current"]
    lists = [current[name] for name in LISTS.values()] + [current.get("other_records_created", [])]
    listed = [entry["event_id"] for entry in itertools.chain(*lists)]
    listed += [current["record_created"]["event_id"]] if current["record_created"] else []
    assert sorted(listed) == sorted(ids)
    assert state["event_count"] == state["valid_event_count"] + state["invalid_event_count"]
    assert state["invalid_event_count"] == len(state["invalid_events"])
    assert state["equivocation_count"] == len(state["equivocations"])


def test_every_permutation_of_some_events():
    events = EVENTS[:8]
    expected = merge([bundle_of(ADA, events, keys=KEYS[0])])
    for turned in itertools.islice(itertools.permutations(events), 0, None, 2000):
        assert merge([bundle_of(ADA, list(turned), keys=KEYS[0])])["state_sha256"] == expected["state_sha256"]
    parts = [bundle_of(ADA, [found], keys=KEYS[0]) for found in events]
    random.Random(0).shuffle(parts)
    assert merge(parts) == expected


def test_invalid_events_are_set_aside_with_their_reasons():
    good = event(ADA, {"n": 1})
    cases = {
        ("content_sha256", "event_id", "signature"): {**good, "payload": {"n": 2}},
        ("signature",): changed(good, ("signature", "signature_b64"), "A" * 86 + "=="),
        ("schema_version",): resign(ADA, {**good, "schema_version": "2.0"}),
        ("subject",): resign(ADA, {**good, "subject_pith_number": "pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF"}),
        ("key",): event(BOB, {"n": 1}),
        ("structure",): None,
    }
    for reasons, bad in cases.items():
        state = merge([bundle_of(ADA, [good, bad])])
        assert state["applied_event_ids"] == [good["event_id"]]
        (aside,) = state["invalid_events"]
        assert tuple(aside["reasons"]) == reasons
        assert aside["event_sha256"] == sha256_hex(bad)
        assert aside["event_id"] == (bad["event_id"] if bad else None)


def test_another_bundle_may_bring_the_key():
    stranger = event(BOB, {"n": 1})
    without, having = bundle_of(ADA, [stranger]), bundle_of(BOB, [stranger])
    assert merge([without])["invalid_event_count"] == 1
    for order in ([without, having], [having, without], [merge([without]), merge([having])]):
        state = merge(order)
        assert (state["valid_event_count"], state["invalid_event_count"]) == (1, 0)


def test_a_bundle_is_judged_by_its_own_keys(trusting):
    stranger = bundle_of(ADA, [record_event(ADA), event(BOB, {"n": 1})])
    report = verify(stranger, trusting)
    assert [check.detail for check in report.failures if check.where == "events[1]"] == [
        "is a trusted key, but the document does not list it"
    ]
    assert merge([stranger], trusting) == merge([stranger])


def test_an_equivocation_is_recorded_with_both_sides():
    one, two = event(ADA, {"ratio": 0.9}), event(ADA, {"ratio": 1.1})
    state = merge([bundle_of(ADA, [one]), bundle_of(ADA, [two])])
    assert state["equivocations"] == [
        {
            "public_key_fingerprint": ADA.public.fingerprint,
            "event_type": "replication_record",
            "target": "t",
            "prev_event": None,
            "event_ids": sorted([one["event_id"], two["event_id"]]),
        }
    ]
    assert len(state["current"]["replication_records"]) == 2  # neither is dropped
    report = verify(bundle_of(ADA, [record_event(ADA), one, two]), REGISTRIES)
    assert report.verified


@pytest.mark.parametrize(
    "second, found",
    [
        (lambda first: event(ADA, {"n": 2}), True),
        (lambda first: event(ADA, {"n": 2}, created_at="2026-07-09T00:00:00Z"), True),
        (lambda first: event(Signer(ADA.private, ADA.key_id, "another name"), {"n": 2}), True),
        (lambda first: event(BOB, {"n": 2}), False),
        (lambda first: event(ADA, {"n": 2}, target="u"), False),
        (lambda first: event(ADA, {"n": 2}, event_type="correction"), False),
        (lambda first: event(ADA, {"n": 2}, target="t\u200b"), True),
        (lambda first: event(ADA, {"n": 2}, target=" t\u00ad\u034f"), True),
        (lambda first: event(ADA, {"n": 2}, prev_event=first["event_id"]), False),
        (lambda first: event(ADA, {"n": 2}, prev_event=first["event_id"], target="t\ufeff"), False),
        (lambda first: event(ADA, {"n": 2}, prev_event="sha256:" + "0" * 64), True),
        (lambda first: event(BOB, {"n": 2}, prev_event=first["event_id"]), False),
        (lambda first: event(ADA, {"n": 2}, supersedes=[first["event_id"]]), False),
        (lambda first: event(BOB, {"n": 2}, supersedes=[first["event_id"]]), False),
        (lambda first: first, False),
    ],
)
def test_what_is_an_equivocation(second, found):
    first = event(ADA, {"n": 1})
    state = merge([bundle_of(ADA, [first, second(first)], keys=(ADA, BOB))])
    assert bool(state["equivocations"]) is found


def test_nobody_else_settles_an_equivocation():
    one, two = event(ADA, {"n": 1}), event(ADA, {"n": 2})
    ids = [one["event_id"], two["event_id"]]
    by_bob = event(BOB, {}, supersedes=ids)
    assert merge([bundle_of(ADA, [one, two, by_bob], keys=(ADA, BOB))])["equivocation_count"] == 1
    by_ada = event(ADA, {}, supersedes=ids)
    assert merge([bundle_of(ADA, [one, two, by_ada])])["equivocation_count"] == 0


def test_invalid_events_equivocate_with_nothing():
    one = event(ADA, {"n": 1})
    forged = changed(event(ADA, {"n": 2}), ("signature", "signature_b64"), "A" * 86 + "==")
    assert merge([bundle_of(ADA, [one, forged])])["equivocations"] == []


def test_links_survive_the_way_through_a_state():
    first = event(ADA, {"n": 1})
    links = {"prev_event": first["event_id"], "supersedes": [first["event_id"]]}
    second = event(ADA, {"n": 2}, created_at="2026-07-02T00:00:00Z", **links)
    state = merge([bundle_of(ADA, [first, second])])
    assert state["current"]["replication_records"][1]["prev_event"] == first["event_id"]
    assert state["current"]["replication_records"][1]["supersedes"] == [first["event_id"]]
    assert merge([state]) == state


def test_the_registrys_names_are_the_registrys(bundle):
    """A sound signature, by a key that the bundle lists under the registry's id, and by the registry's name."""
    for posing in (Signer(EVE.private, "pith-v1-2026-05", "eve"), Signer(EVE.private, "eve", "pith.science")):
        forged = event(posing, {"n": 1}, subject=bundle["pith_number"])
        widened = {
            **bundle,
            "events": [*bundle["events"], forged],
            "public_keys": [*bundle["public_keys"], posing.public.as_entry()],
        }
        state = merge([widened])
        assert state["applied_event_ids"] == bundle["state"]["applied_event_ids"]
        assert state["invalid_event_count"] == 1


def test_order_within_a_state():
    late_record = record_event(ADA, created_at="2026-08-01T00:00:00Z")
    events = [
        event(ADA, {"n": n}, target=str(n), created_at=time)
        for n, time in enumerate(["2026-07-01T00:00:00.5Z", "2026-07-01T00:00:00Z", "2026-07-02T00:00:00Z"])
    ]
    state = merge([bundle_of(ADA, [*events, late_record])])
    expected = [late_record, events[1], events[0], events[2]]
    assert state["applied_event_ids"] == [found["event_id"] for found in expected]


def test_what_cannot_be_merged(bundle, state):
    for documents, message in (
        ([], "there is nothing to merge"),
        ([bundle, state], "another paper"),
        ([5], "holds no JSON object"),
        ([{}], "is no open-graph bundle"),
        ([{**bundle, "pith_number": "x"}], "is a bundle without a pith number"),
        ([{**bundle, "events": {}}], "`events` is an object, not a list"),
        ([{**state, "current": []}], "`current` is a list, not an object"),
        ([{**state, "invalid_events": 5}], "is no list"),
        ([{**state, "invalid_events": [5]}], r"invalid_events\[0\] is not event_id"),
        (
            [{**state, "invalid_events": [{"event_id": None, "event_sha256": "0" * 64, "reasons": []}]}],
            "is not event_id",
        ),
    ):
        with pytest.raises(ProvenanceError, match=message):
            merge(documents)


def test_made_up_times_are_invalid():
    for time in ("2026-02-30T00:00:00Z", TIME[:-1]):
        bad = resign(ADA, {**event(ADA, {}), "created_at": time})
        assert merge([bundle_of(ADA, [bad])])["invalid_events"][0]["reasons"] == ["created_at"]
