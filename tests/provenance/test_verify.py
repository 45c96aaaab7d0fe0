"""Each kind of tampering is named, even by one who signs the result anew with a key of their own or a trusted one."""

import base64
import copy

import pytest

from gradfold.provenance import ProvenanceError, TrustStore, sha256_hex, sign_bundle, verify
from gradfold.provenance.events import event_of
from gradfold.provenance.keys import read_keys
from tests.provenance.makers import TIME, bundle_of, changed, event, failed, record, record_event, resign, signer


@pytest.fixture
def own(ada):
    """A bundle that ada signed throughout."""
    first = event(ada, {"n": 1})
    return bundle_of(ada, [record_event(ada), first, event(ada, {"n": 2}, prev_event=first["event_id"])])


def anew(bundle, by, state=True):
    """The bundle's own digests and signature made again, so that only what lies deeper can give it away."""
    bundle = copy.deepcopy(bundle)
    if state:
        inner = {key: value for key, value in bundle["state"].items() if key != "state_sha256"}
        bundle["state"]["state_sha256"] = sha256_hex(inner)
    bundle["bundle_signature"] = sign_bundle(bundle, by)
    return bundle


def test_an_own_bundle_verifies_for_those_who_trust_its_signer(own, ada, trusting):
    assert verify(own, trusting).verified
    report = verify(bundle_of(ada, [event(ada, {"n": 1})]))
    assert not report.failures and report.verdict == "valid signature, untrusted key"


SIGNATURE = {
    "signed_message": ("canonical_sha256_bytes", "signed_message"),
    "signature_status": ("unsigned", "signature_status"),
    "algorithm": ("rsa", "algorithm"),
    "key_id": ("another", "key_id"),
    "public_key_fingerprint": ("0" * 32, "key"),
    "signature_b64": ("A" * 86 + "==", "signature"),
    "signed_at": ("2020-01-01T00:00:00Z", "signed_at"),
}


@pytest.mark.parametrize("field", SIGNATURE)
@pytest.mark.parametrize("place", ["event", "receipt", "bundle"])
def test_parts_of_a_signature(own, ada, trusting, field, place):
    value, name = SIGNATURE[field]
    if place == "event":
        bundle = anew(changed(own, ("events", 1, "signature", field), value), ada)
    elif place == "bundle":
        bundle = changed(own, ("bundle_signature", field), value)
        name = f"bundle_{name}"
    else:
        if field == "signed_message":
            value = "bundle_sha256_bytes"
        damaged = changed(own["events"][0], ("payload", "receipt", field), value)
        bundle = bundle_of(ada, [resign(ada, damaged)])
        name = f"receipt_{name}"
    assert name in failed(verify(bundle, trusting))


def test_a_signature_has_one_spelling(own, trusting):
    """The last letter of base64 holds bits that decoding drops."""
    text = own["bundle_signature"]["signature_b64"]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    twin = text[:-3] + letters[letters.index(text[-3]) ^ 1] + "=="
    assert base64.b64decode(twin) == base64.b64decode(text)
    for other in (twin, text + "\n", text.rstrip("="), " " + text):
        assert "bundle_signature" in failed(
            verify(changed(own, ("bundle_signature", "signature_b64"), other), trusting)
        )


EVENT = {
    "payload": ({"n": 3}, {"content_sha256", "event_id"}),
    "target": ("u", {"content_sha256", "event_id"}),
    "content_sha256": ("0" * 64, {"content_sha256"}),
    "event_id": ("sha256:" + "0" * 64, {"event_id"}),
    "signature": (None, {"structure", "signature"}),
    "supersedes": ("x", {"structure", "content_sha256"}),
}


@pytest.mark.parametrize("field", EVENT)
def test_parts_of_an_event(own, ada, trusting, field):
    value, names = EVENT[field]
    bundle = anew(changed(own, ("events", 1, field), value), ada)
    assert names <= failed(verify(bundle, trusting))


SIGNED = {
    "schema_version": ("1.1", "schema_version"),
    "event_type": ("gossip", "event_type"),
    "subject_pith_number": ("pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF", "subject"),
    "created_at": ("yesterday", "created_at"),
    "prev_event": (7, "structure"),
    "supersedes": (["sha256:1"], "link_form"),
    "signer": ({"signer_id": "ada"}, "signer"),
    "payload": ([], "structure"),
    "note": ("more", "structure"),
}


@pytest.mark.parametrize("field", SIGNED)
def test_an_event_signed_wrong_is_wrong(ada, trusting, field):
    value, name = SIGNED[field]
    content = {**event(ada, {"n": 1}), field: value}
    bundle = bundle_of(
        ada, [record_event(ada), resign(ada, content) if field != "created_at" else timeless(ada, content)]
    )
    report = verify(bundle, trusting)
    assert name in failed(report)
    (aside,) = bundle["state"]["invalid_events"]
    assert name in aside["reasons"]


def timeless(by, content):
    damaged = resign(by, {**content, "created_at": TIME})
    return resign(by, {**damaged, "created_at": content["created_at"]})


def test_missing_and_additional_and_repeated_events(own, ada, trusting):
    assert {"missing_events", "recomputed_event_count"} <= failed(
        verify(anew({**own, "events": own["events"][:2]}, ada), trusting)
    )
    extra = event(ada, {"n": 9}, target="other")
    more = anew({**own, "events": [*own["events"], extra]}, ada)
    assert {"unapplied_events", "recomputed_state_sha256"} <= failed(verify(more, trusting))
    twice = anew({**own, "events": [*own["events"], own["events"][1]]}, ada)
    assert failed(verify(twice, trusting)) == {"duplicate_events"}
    assert failed(verify(anew({**own, "events": own["events"][::-1]}, ada), trusting)) == set()  # order is free


def test_links(ada, bob, trusting):
    nowhere = "sha256:" + "0" * 64
    foreign = event(ada, {"n": 1}, subject="pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF")
    dangling = bundle_of(ada, [record_event(ada), event(ada, {"n": 1}, prev_event=nowhere)])
    assert failed(verify(dangling, trusting)) == {"links"}
    dangling = bundle_of(ada, [record_event(ada), event(ada, {"n": 1}, supersedes=[nowhere])])
    assert failed(verify(dangling, trusting)) == {"links"}
    across = bundle_of(ada, [record_event(ada), foreign, event(ada, {"n": 1}, prev_event=foreign["event_id"])])
    report = verify(across, trusting)
    assert {"links", "subject"} <= failed(report)
    assert any("is of another paper" in check.detail for check in report.failures)
    single = verify(event(ada, {}, prev_event=nowhere), trusting)
    assert single.verified and any(check.name == "links" and check.status == "not-checked" for check in single.checks)


def test_circles_of_links(ada, trusting):
    ids = ["sha256:" + digit * 64 for digit in "ab"]
    events = []
    for own_id, other_id in zip(ids, reversed(ids)):
        content = event(ada, {}, prev_event=other_id)
        events.append({**content, "event_id": own_id})  # a circle cannot have true ids
    report = verify(bundle_of(ada, [record_event(ada), *events]), trusting)
    assert {"link_circles", "event_id"} <= failed(report)
    itself = {**event(ada, {}, supersedes=[ids[0]]), "event_id": ids[0]}
    assert "link_circles" in failed(verify(bundle_of(ada, [record_event(ada), itself]), trusting))


def test_another_key_under_a_trusted_id(bundle, ada, trusting):
    """mallory's own key under the registry's id, in the events, in the key list and as the bundle's signer."""
    from gradfold.provenance import Signer

    mallory = Signer(signer("m", 66).private, "pith-v1-2026-05", "pith.science", "pith_registry")
    forged = resign(mallory, {**bundle["events"][1], "signer": mallory.describe()})
    damaged = {**bundle, "events": [bundle["events"][0], forged]}
    damaged["public_keys"] = [*bundle["public_keys"], mallory.public.as_entry()]
    report = verify(anew(damaged, mallory), trusting)
    assert {"key_id", "signer", "bundle_key_id"} <= failed(report)
    alone = verify(forged)
    assert {"key_id", "signer"} <= failed(alone)


def test_a_trusted_key_under_another_name(ada, bob, trusting):
    """bob is trusted, but not as ada."""
    from gradfold.provenance import Signer

    for posing in (Signer(bob.private, ada.key_id, "bob"), Signer(bob.private, bob.key_id, "ada")):
        report = verify(event(posing, {"n": 1}), trusting)
        assert "signer" in failed(report)


def test_one_id_for_two_keys(own, ada, bob, trusting):
    from gradfold.provenance import PublicKey

    twin = PublicKey(signer("x", 77).public.raw, "shared").as_entry()
    another = PublicKey(signer("x", 78).public.raw, "shared").as_entry()
    report = verify(anew({**own, "public_keys": [*own["public_keys"], twin, another]}, ada), trusting)
    assert failed(report) == {"key_id"}


@pytest.mark.parametrize(
    "field, value",
    [("public_key_b64", "AAAA"), ("public_key_hex", "00" * 32), ("fingerprint_sha256_hex", "0" * 32),
     ("fingerprint_sha256_b32_first128bits", "A" * 26), ("algorithm", "rsa"), ("format", "pem"), ("key_id", None)],
)  # fmt: skip
def test_an_entry_that_contradicts_itself(own, ada, trusting, field, value):
    report = verify(anew(changed(own, ("public_keys", 0, field), value), ada), trusting)
    assert field in failed(report)


TOP = {
    "bundle_type": "pith_open_graph_bundlf",
    "bundle_version": "1.1",
    "pith_number": "pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF",
    "short_pith_number": "pith:GWT7BTE6",
    "canonical_sha256": "0" * 64,
    "source": {"kind": "arxiv", "id": "2601.00002", "version": 1},
    "source_aliases": [],
    "events": {},
    "public_keys": 5,
    "merge_version": "pith-open-graph-merge-v2",
    "built_at": None,
    "state": [],
    "mirror_hints": "x",
    "timestamp_proofs": 0,
    "canonical_record": "x",
    "bundle_signature": True,
}


@pytest.mark.parametrize("field", TOP)
def test_parts_of_a_bundle(own, ada, trusting, field):
    damaged = {**own, field: TOP[field]}
    if field != "bundle_signature":
        damaged = anew(damaged, ada, state=False)
    assert failed(verify(damaged, trusting))


@pytest.mark.parametrize("year", ["2025", "2027"])
def test_the_year_of_a_number(ada, trusting, year):
    """It is in no digest of the record, but an event's digest covers it, and it must be that of the record."""
    number = f"pith:{year}:" + event(ada, {})["subject_pith_number"].rpartition(":")[2]
    moved = resign(ada, {**record_event(ada), "subject_pith_number": number})
    assert "pith_year" in failed(verify(moved, trusting))


def test_a_receipt_for_another_record(ada, trusting):
    moved = record_event(ada)
    moved["payload"]["receipt"] = record_event(ada, record("2601.99999"))["payload"]["receipt"]
    report = verify(resign(ada, moved), trusting)
    assert {"receipt_canonical_sha256", "receipt_signature"} <= failed(report)
    without = record_event(ada)
    del without["payload"]["receipt"]
    assert "receipt" in failed(verify(resign(ada, without), trusting))


def test_another_signers_receipt(ada, bob, trusting):
    moved = record_event(ada)
    moved["payload"]["receipt"] = record_event(bob)["payload"]["receipt"]
    assert "receipt_fingerprint" in failed(verify(resign(ada, moved), trusting))


def test_a_state_is_rebuilt(state):
    entry = state["current"]["graph_snapshots"][0]
    assert event_of(entry, "graph_snapshot", state["pith_number"])["content_sha256"] == entry["event_id"][7:]
    for path, value in (
        (("current", "graph_snapshots", 0, "payload", "verdict_id"), 1),
        (("current", "graph_snapshots", 0, "event_type"), "graph_snapshot"),
        (("current", "graph_snapshots", 0, "prev_event"), None),
        (("current", "gossip"), []),
        (("gossip",), 1),
        (("valid_event_count",), 2.0),
        (("applied_event_ids",), state["applied_event_ids"][::-1]),
        (("current", "other_records_created"), [state["current"]["record_created"]]),
    ):
        damaged = changed(state, path, value)
        damaged["state_sha256"] = sha256_hex({k: v for k, v in damaged.items() if k != "state_sha256"})
        assert failed(verify(damaged)), path


def test_a_state_without_a_receipt_proves_nothing(state):
    del state["current"]["record_created"]["payload"]["receipt"]
    assert "receipt" in failed(verify(state))
    state["current"]["record_created"] = None
    assert "record_created" in failed(verify(state))


@pytest.mark.parametrize("content", [None, [], 5, "x", {}, {"a": 1}])
def test_what_is_no_document(content):
    with pytest.raises(ProvenanceError, match="is no open-graph|holds no JSON object"):
        verify(content)


@pytest.mark.slow
def test_too_many_events():
    with pytest.raises(ProvenanceError, match="holds 1,000,000 events; at most 100,000 are read"):
        verify({"bundle_type": "pith_open_graph_bundle", "events": [{}] * 1_000_000})


def test_the_keys_in_a_bundle_cannot_be_trusted_by_mistake(own):
    from gradfold.provenance import canonical_bytes

    with pytest.raises(ProvenanceError, match="only claims"):
        read_keys(canonical_bytes(own))


def test_a_store_does_not_take_two_keys_for_one_id(ada):
    from gradfold.provenance import PITH_REGISTRY, PublicKey

    store = TrustStore()
    with pytest.raises(ProvenanceError, match="another trusted key"):
        store.add(PublicKey(ada.public.raw, PITH_REGISTRY.key_id))
    with pytest.raises(ProvenanceError, match="is trusted as"):
        store.add(PublicKey(PITH_REGISTRY.raw, "mine"))
    store.add(PublicKey(PITH_REGISTRY.raw))  # without a name: the same key
    assert store.keys == [PITH_REGISTRY]


@pytest.mark.slow
def test_ten_thousand_events(ada, trusting):
    """Not timed: `benchmarks/provenance.py` is. One digest, one signature and one chain for each."""
    chain = [record_event(ada)]
    for n in range(10_000):
        chain.append(event(ada, {"n": n}, prev_event=chain[-1]["event_id"] if n else None))
    bundle = bundle_of(ada, chain)
    report = verify(bundle, trusting)
    assert report.verified and report.trusted_signatures == 10_003
    assert bundle["state"]["valid_event_count"] == 10_001
