"""Who may say what: records only by registries, no unsigned claims in a state, names that only look alike."""

import os
import stat

import pytest

from gradfold.provenance import (
    OUTCOMES,
    RELATIONS,
    ChecksFailed,
    ProvenanceError,
    PublicKey,
    Signer,
    TrustStore,
    append,
    canonical_bytes,
    citation_payload,
    merge,
    sha256_hex,
    sign_bundle,
    verify,
)
from gradfold.provenance.events import LISTS
from gradfold.provenance.plain_text import plain_text
from tests.provenance.makers import REGISTRIES, bundle_of, changed, event, failed, record, record_event, resign, signer

ADA, BOB, EVE = signer("ada", 1), signer("bob", 2), signer("eve", 3)
NUMBER = event(ADA, {})["subject_pith_number"]


def plainly_trusting(*signers):
    """A store that trusts keys for what they sign, but not as registries."""
    return TrustStore([*TrustStore().keys, *(who.public for who in signers)])


# records


def test_a_record_counts_from_a_registry_only():
    bundle = bundle_of(EVE, [record_event(EVE), event(EVE, {"n": 1})])
    assert "registry" in failed(verify(bundle, plainly_trusting(EVE)))
    assert "registry" in failed(verify(record_event(EVE), plainly_trusting(EVE)))
    assert verify(event(EVE, {"n": 1}), plainly_trusting(EVE)).verified
    as_registry = TrustStore(registries=[EVE.public])
    assert verify(record_event(EVE), as_registry).verified
    state = merge([bundle], as_registry)
    assert state["current"]["record_created"] is not None and verify(state, as_registry).failures
    for store in (TrustStore(), plainly_trusting(EVE), REGISTRIES):
        state = merge([bundle], store)
        assert state["current"]["record_created"] is None and state["valid_event_count"] == 1
        assert [aside["reasons"] for aside in state["invalid_events"]] == [["registry"]]


def test_an_earlier_record_does_not_take_the_registrys_place(bundle):
    """Sound in every other way: the same record, its own receipt, dated before the registry's."""
    forged = record_event(EVE, bundle["canonical_record"], created_at="2026-06-22T07:08:32Z")
    assert forged["subject_pith_number"] == bundle["pith_number"]
    other = {**bundle, "events": [forged], "public_keys": [EVE.public.as_entry()]}
    state = merge([other, bundle], plainly_trusting(EVE))
    assert state["current"] == bundle["state"]["current"]
    assert [aside["reasons"] for aside in state["invalid_events"]] == [["registry"]]
    trusting = merge([other, bundle], TrustStore(registries=[EVE.public]))
    assert trusting["current"]["record_created"]["signer"] == EVE.describe()
    assert len(trusting["current"]["other_records_created"]) == 1


def test_a_state_with_a_receipt_of_no_registry():
    state = merge([bundle_of(EVE, [record_event(EVE)])], TrustStore(registries=[EVE.public]))
    assert verify(state, TrustStore(registries=[EVE.public])).verified
    assert "registry" in failed(verify(state, plainly_trusting(EVE)))
    assert not verify(state).verified


def test_who_was_a_registry_elsewhere_does_not_stick():
    """A state lists a record as invalid for one user; the next knows its registry."""
    bundle = bundle_of(EVE, [record_event(EVE)])
    plain, knowing = TrustStore(), TrustStore(registries=[EVE.public])
    for documents in ([merge([bundle], plain), bundle], [bundle, merge([bundle], plain)]):
        assert merge(documents, knowing) == merge([bundle], knowing)


def test_nobody_else_signs_as_a_registry():
    posing = Signer(ADA.private, ADA.key_id, ADA.signer_id, "pith_registry")
    made = event(posing, {"n": 1})
    assert failed(verify(made, plainly_trusting(ADA))) == {"registry"}
    assert verify(made, TrustStore(registries=[ADA.public])).verified
    assert merge([bundle_of(ADA, [made])])["invalid_events"][0]["reasons"] == ["registry"]


# unsigned claims

UNSIGNED = [name for name in LISTS if name != "graph_snapshot"]


@pytest.mark.parametrize("event_type", UNSIGNED)
@pytest.mark.parametrize("who", ["the registry", "a stranger", "a trusted key"])
def test_an_unsigned_claim_in_a_state(bundle, event_type, who):
    """Whoever can compute digests can put one into the registry's state; only its signature would tell."""
    describe = bundle["events"][0]["signer"] if who == "the registry" else EVE.describe()
    made = event(EVE, {"n": 1}, subject=bundle["pith_number"], event_type=event_type)
    made = resign(EVE, {**made, "signer": describe})
    state = merge([bundle])
    claim = {key: made[key] for key in ("event_id", "target", "created_at", "signer", "payload")}
    state["current"][LISTS[event_type]].append(claim)
    state["applied_event_ids"].append(made["event_id"])
    state["event_count"] = state["valid_event_count"] = 3
    state["state_sha256"] = sha256_hex({key: value for key, value in state.items() if key != "state_sha256"})
    store = plainly_trusting(EVE) if who == "a trusted key" else TrustStore()
    report = verify(state, store)
    assert failed(report) == {"signed_event"}, report.failures
    assert "unsigned claim in the registry's name" in report.failures[0].detail
    with pytest.raises(ChecksFailed, match="unsigned claim in the registry's name"):
        append(state, ADA, "correction", "t", {}, store=store)


def test_a_snapshot_in_anothers_name(bundle):
    own = append(bundle, ADA, "graph_snapshot", "graph", {"graph_snapshot": {}})
    assert verify(own, plainly_trusting(ADA)).verified
    assert failed(verify(own["state"], plainly_trusting(ADA))) == {"signed_event"}


def test_signed_events_may_be_required(bundle, state):
    assert verify(bundle, require_signed_events=True).verified
    assert verify(state).verified
    report = verify(state, require_signed_events=True)
    assert [(check.where, check.name) for check in report.failures] == [
        ("current.record_created", "signed_event"),
        ("current.graph_snapshots[0]", "signed_event"),
    ]


# replay, and states that are not their events'


def test_an_event_of_another_paper(bundle, trusting):
    """A true event, moved: into another paper's bundle, under another number, and with the number changed."""
    true = event(ADA, {"n": 1})
    moved = {
        **bundle,
        "events": [*bundle["events"], true],
        "public_keys": [*bundle["public_keys"], ADA.public.as_entry()],
    }
    moved["bundle_signature"] = sign_bundle(moved, ADA)
    assert {"subject", "unapplied_events"} & failed(verify(moved, trusting))
    assert merge([moved])["applied_event_ids"] == bundle["state"]["applied_event_ids"]
    relabelled = {**true, "subject_pith_number": bundle["pith_number"]}
    assert {"content_sha256", "event_id"} <= failed(verify(relabelled, trusting))
    with pytest.raises(ProvenanceError, match="another paper"):
        merge([bundle, true])


def test_signatures_of_one_kind_are_no_other_kind(bundle):
    """The registry's receipt as an event's signature, and an event's as the bundle's."""
    receipt = bundle["events"][0]["payload"]["receipt"]["signature_b64"]
    assert "signature" in failed(verify(changed(bundle, ("events", 0, "signature", "signature_b64"), receipt)))
    own = bundle["events"][0]["signature"]["signature_b64"]
    assert "bundle_signature" in failed(verify(changed(bundle, ("bundle_signature", "signature_b64"), own)))


def test_the_state_of_other_events(trusting):
    one = bundle_of(ADA, [record_event(ADA), event(ADA, {"n": 1})])
    other = bundle_of(ADA, [record_event(ADA), event(ADA, {"n": 2})])
    swapped = {**one, "state": other["state"]}
    swapped["bundle_signature"] = sign_bundle(swapped, ADA)
    assert {"missing_events", "unapplied_events", "recomputed_state_sha256"} <= failed(verify(swapped, trusting))
    for path, value in (
        (("state", "equivocations"), [{"event_ids": []}]),
        (("state", "invalid_events"), [{"event_id": None, "event_sha256": "0" * 64, "reasons": ["key"]}]),
        (("state", "current", "corrections"), one["state"]["current"]["replication_records"]),
        (("state", "current", "canonical_record"), record("2601.99999")),
    ):
        damaged = changed(one, path, value)
        damaged["state"]["state_sha256"] = sha256_hex(
            {key: item for key, item in damaged["state"].items() if key != "state_sha256"}
        )
        damaged["bundle_signature"] = sign_bundle(damaged, ADA)
        assert "recomputed_state_sha256" in failed(verify(damaged, trusting))


# equivocation


@pytest.mark.parametrize(
    ("target", "same"),
    [
        pytest.param("caf\u00e9", True, id="composed"),
        pytest.param("cafe\u0301", True, id="decomposed"),
        pytest.param("cafe\u034f\u0301", True, id="an invisible joiner between letter and accent"),
        pytest.param("ca\u200bf\u00e9", True, id="a space of no width"),
        pytest.param("\ufeffcaf\u00e9", True, id="a byte order mark"),
        pytest.param("caf\u00e9\u202e", True, id="a change of direction"),
        pytest.param("caf\u00e9\ufe0f", True, id="a variation selector"),
        pytest.param("caf\U000e0041\u00e9", True, id="a tag"),
        pytest.param("caf\u00e9\u3164", True, id="a filler"),
        pytest.param(" caf\u00e9\u00a0\n", True, id="white space around it"),
        pytest.param("caf\u00e9\0", True, id="a control character"),
        pytest.param("cafe", False, id="no accent"),
        pytest.param("ca f\u00e9", False, id="white space within"),
        pytest.param("Caf\u00e9", False, id="a capital"),
    ],
)
def test_targets_that_look_the_same(target, same):
    one, two = event(ADA, {"n": 1}, target="caf\u00e9"), event(ADA, {"n": 2}, target=target)
    state = merge([bundle_of(ADA, [one, two])])
    assert state["equivocation_count"] == same
    assert merge([state]) == state
    if same:
        assert state["equivocations"][0]["target"] == "caf\u00e9"
    chained = append(bundle_of(ADA, [record_event(ADA), one]), ADA, "replication_record", target, {}, store=REGISTRIES)
    assert chained["events"][-1]["prev_event"] == (one["event_id"] if same else None)


def test_a_link_excuses_only_what_it_leads_to():
    first, nowhere = event(ADA, {"n": 1}), "sha256:" + "0" * 64
    elsewhere = event(ADA, {"n": 2}, target="other", prev_event=first["event_id"])
    by_bob = event(BOB, {"n": 3}, prev_event=first["event_id"])
    aside = changed(event(ADA, {"n": 4}, prev_event=first["event_id"]), ("payload", "n"), 5)
    for between, previous, excused in (
        ([], first["event_id"], True),
        ([], nowhere, False),
        ([elsewhere], elsewhere["event_id"], True),  # over the signer's event on something else
        ([], elsewhere["event_id"], False),  # which is not there
        ([by_bob], by_bob["event_id"], False),  # another signer's word
        ([aside], aside["event_id"], False),  # an event that is not valid
    ):
        second = event(ADA, {"n": 9}, prev_event=previous)
        state = merge([bundle_of(ADA, [first, *between, second], keys=(ADA, BOB))])
        found = [slot["event_ids"] for slot in state["equivocations"]]
        assert found == ([] if excused else [sorted([first["event_id"], second["event_id"]])])


def test_forks_of_a_long_chain():
    chain = [event(ADA, {"n": 0})]
    for n in range(1, 3000):
        chain.append(event(ADA, {"n": n}, target="t" if n % 2 else "u", prev_event=chain[-1]["event_id"]))
    assert merge([bundle_of(ADA, chain)])["equivocations"] == []
    fork = event(ADA, {"n": -1}, target="t", prev_event=chain[1500]["event_id"])
    (slot,) = merge([bundle_of(ADA, [*chain, fork])])["equivocations"]
    assert slot["event_ids"] == sorted([chain[1501]["event_id"], fork["event_id"]])
    assert slot["prev_event"] == chain[1499]["event_id"]


# names


@pytest.mark.parametrize("name", ["pith.science\u200b", "\ufeffpith.science", "pith.science ", "pith.\u00adscience"])
def test_a_name_that_looks_like_the_registrys(name):
    assert plain_text(name) == "pith.science"
    posing = Signer(EVE.private, "eve", name)
    assert "signer" in failed(verify(event(posing, {"n": 1}), plainly_trusting(EVE)))
    assert merge([bundle_of(posing, [event(posing, {"n": 1})])])["valid_event_count"] == 0


@pytest.mark.parametrize("key_id", ["pith-v1-2026-05\u200b", " pith-v1-2026-05", "pith-v1\u2060-2026-05"])
def test_a_key_id_that_looks_like_the_registrys(key_id):
    posing = Signer(EVE.private, key_id, "eve")
    assert {"signer", "key_id"} <= failed(verify(event(posing, {"n": 1}), TrustStore()))
    with pytest.raises(ProvenanceError, match="another trusted key"):
        TrustStore().add(PublicKey(EVE.public.raw, key_id))


def test_one_key_under_two_ids(trusting):
    """Whose id is it then? And the registry's key does not go by any other name."""
    bundle = bundle_of(ADA, [record_event(ADA)])
    for twin in (PublicKey(ADA.public.raw, "zoe"), PublicKey(TrustStore().keys[0].raw, "zoe")):
        entries = [*bundle["public_keys"], twin.as_entry(), TrustStore().keys[0].as_entry()]
        damaged = {**bundle, "public_keys": entries}
        damaged["bundle_signature"] = sign_bundle(damaged, ADA)
        assert failed(verify(damaged, trusting)) == {"key_id"}


# files of trusted keys


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o666, 0o664, 0o622, 0o777, 0o606])
@pytest.mark.parametrize("registry", [False, True])
def test_a_trust_store_that_others_may_write_to(tmp_path, mode, registry):
    path = tmp_path / "keys.json"
    path.write_bytes(canonical_bytes([ADA.public.as_entry()]))
    path.chmod(mode)
    store = TrustStore()
    link = tmp_path / "link"
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(
            ProvenanceError, match="others may write to it, so its keys are not yours to trust; run: chmod"
        ):
            store.add_file(name, registry)
    assert len(store.keys) == 1 and stat.S_IMODE(path.stat().st_mode) == mode
    path.chmod(0o644)
    store.add_file(path, registry)
    assert store.find(ADA.public.fingerprint) and store.is_registry(ADA.public.fingerprint) is registry


def test_trusting_a_key_twice():
    store = plainly_trusting(ADA)
    assert not store.is_registry(ADA.public.fingerprint)
    store.add(ADA.public, registry=True)
    store.add(ADA.public)
    assert store.is_registry(ADA.public.fingerprint) and len(store.keys) == 2
    assert store.with_key(BOB.public).is_registry(ADA.public.fingerprint)
    assert not store.with_key(BOB.public).is_registry(BOB.public.fingerprint)


# words


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_citation(bundle, trusting, relation):
    target, payload = citation_payload(bundle, "2601.00001", relation, claim="The folded step.")
    assert payload["citation"]["relation"] == relation
    assert payload["citation"]["cited_pith_number"] == bundle["pith_number"]
    own = append(bundle, ADA, "citation_signature", target, payload)
    assert verify(own, trusting).verified and own["state"]["current"]["citation_signatures"][0]["payload"] == payload


@pytest.mark.parametrize(
    ("citing", "relation", "message"),
    [
        ("2601.00001", "likes", "relation = 'likes': takes supports, refutes, extends, uses_method, depends_on"),
        ("", "cites", "--citing takes"),
        ("\u200b", "cites", "--citing takes"),
        ("pith:2026:short", "cites", "is no pith number"),
        ("pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF", "cites", "is the cited paper itself"),
    ],
)
def test_what_is_no_citation(bundle, citing, relation, message):
    with pytest.raises(ProvenanceError, match=message):
        citation_payload(bundle, citing, relation)


@pytest.mark.parametrize(
    ("event_type", "payload", "name"),
    [
        ("citation_signature", {"citation": {"relation": "likes"}}, "relation"),
        ("citation_signature", {"citation": {"relation": ["cites"]}}, "relation"),
        ("replication_record", {"replication_record": {"outcome": "success"}}, "outcome"),
        ("replication_record", {"replication_record": {"outcome": None}}, "outcome"),
        ("replication_record", {"replication_record": {"outcome": OUTCOMES[2]}}, None),
        ("replication_record", {"replication_record": {}}, None),
        ("replication_record", {"citation": {"relation": "likes"}}, None),
    ],
)
def test_words_that_the_registry_does_not_know(bundle, trusting, event_type, payload, name):
    made = event(ADA, payload, event_type=event_type)
    assert failed(verify(bundle_of(ADA, [record_event(ADA), made]), trusting)) == ({name} if name else set())
    if name:
        with pytest.raises(ChecksFailed, match=f"would not verify: .* {name}: .* is not one of the registry's words"):
            append(bundle, ADA, event_type, "t", payload)
