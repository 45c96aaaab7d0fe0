"""Keys on disk, appended events, built bundles: what is signed here verifies here."""

import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradfold.provenance import (
    ChecksFailed,
    NeedsPassphrase,
    ProvenanceError,
    TrustStore,
    append,
    build_bundle,
    generate_key,
    load_signer,
    merge,
    mirror_hint,
    new_signer,
    sign_event,
    verify,
)
from gradfold.provenance.events import LISTS
from gradfold.provenance.plain_text import plain_text
from tests.provenance.makers import changed, failed, read_seed, signer

payloads = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda children: st.lists(children, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)  # fmt: skip


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    payloads,
    st.sampled_from(sorted(LISTS)),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(plain_text),
    st.booleans(),
)
def test_what_is_signed_verifies(trusting, payload, event_type, target, from_state):
    ada = signer("ada", 1)
    paper = read_seed("chunkft_state" if from_state else "forge_bundle")
    bundle = append(paper, ada, event_type, target, payload, store=trusting)
    report = verify(bundle, trusting)
    assert report.verified, report.failures
    assert verify(bundle["events"][-1], trusting).verified
    whole = merge([paper, bundle])
    assert failed(verify(whole, trusting)) == {"signed_event"}  # a state says it, but holds no signature of it
    assert whole["current"][LISTS[event_type]][-1]["payload"] == payload
    assert whole["valid_event_count"] == 3


def test_one_signers_events_follow_each_other(bundle, ada, bob, trusting):
    """Several in one second, whose order in the state is by id: each still follows the last."""
    for n in range(6):
        bundle = append(bundle, ada, "replication_record", "t", {"n": n}, store=trusting)
        bundle = append(bundle, bob, "replication_record", "t", {"n": n}, store=trusting)
    for who in (ada, bob):
        own = [event for event in bundle["events"] if event["signer"] == who.describe()]
        assert [event["prev_event"] for event in own] == [None, *(event["event_id"] for event in own[:-1])]
    assert bundle["state"]["equivocations"] == []
    assert verify(bundle, trusting).verified


def test_a_bundle_that_fails_is_not_built_on(bundle, ada, bob):
    with pytest.raises(ChecksFailed, match="the paper's bundle is not verified: "):
        append(changed(bundle, ("events", 1, "payload", "verdict_id"), 1), ada, "correction", "t", {})
    strangers = build_bundle(bundle, bob)
    with pytest.raises(ChecksFailed, match="untrusted key"):
        append(strangers, ada, "correction", "t", {})
    assert append(strangers, bob, "correction", "t", {})  # an own key is trusted
    with pytest.raises(ProvenanceError, match="single event"):
        append(bundle["events"][0], ada, "correction", "t", {})


def test_nothing_is_signed_that_would_not_verify(bundle, ada):
    nowhere = "sha256:" + "0" * 64
    with pytest.raises(ChecksFailed, match=f"the bundle would not verify: events\\[2\\] links: {nowhere} is not here"):
        append(bundle, ada, "correction", "t", {}, supersedes=[nowhere])
    own = append(bundle, ada, "correction", "t", {"n": 1})
    with pytest.raises(ChecksFailed, match="the paper's state is not verified: .* unsigned claim"):
        append(merge([own]), ada, "correction", "u", {"n": 2})


def test_nobody_signs_in_the_registrys_name(bundle, ada):
    with pytest.raises(ProvenanceError, match="another trusted key; rename yours"):
        append(bundle, signer_named(ada, key_id="pith-v1-2026-05"), "correction", "t", {})
    with pytest.raises(ChecksFailed, match="an event fails its checks \\(signer\\)"):
        append(bundle, signer_named(ada, signer_id="pith.science"), "correction", "t", {})


def signer_named(who, **names):
    from gradfold.provenance import signer_for

    return signer_for(who.private, **names)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"subject": "pith:1"}, "is no pith number"),
        ({"event_type": "record_created"}, "event type 'record_created': takes graph_snapshot"),
        ({"event_type": "gossip"}, "event type"),
        ({"target": ""}, "takes a target"),
        ({"payload": {"x": float("nan")}}, "no canonical form"),
        ({"payload": {1: 2}}, "which is not text"),
        ({"prev_event": "x"}, "take event ids"),
        ({"supersedes": ["sha256:0"]}, "take event ids"),
        ({"created_at": "now"}, "takes a time"),
    ],
)
def test_what_cannot_be_signed(ada, bundle, change, message):
    words = {
        "subject": bundle["pith_number"],
        "event_type": "correction",
        "target": "t",
        "payload": {},
        **change,
    }
    with pytest.raises(ProvenanceError, match=message):
        sign_event(ada, **words)


def test_mirrors(bundle, ada, trusting):
    hint = mirror_hint("https://example.org/forge.json")
    assert hint["name"] == "example.org"
    built = build_bundle(bundle, ada, mirror_hints=[hint])
    assert built["mirror_hints"] == [*bundle["mirror_hints"], hint]
    assert verify(built, trusting).verified
    for url in ("http://example.org/x", "https://a b", "file:///x", "https://a\n"):
        with pytest.raises(ProvenanceError, match="mirror"):
            mirror_hint(url)


def test_keys_on_disk(tmp_path):
    path = tmp_path / "key.pem"
    made = new_signer("ada", "ada-2026")
    generate_key(path, made)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    read = load_signer(path)
    assert (read.public, read.key_id, read.signer_id) == (made.public, "ada-2026", "ada")
    store = TrustStore()
    store.add_file(f"{path}.pub")
    assert store.find(made.public.fingerprint) == made.public
    before = path.read_bytes()
    for again in (path, tmp_path / "other.pem"):
        (tmp_path / "other.pem.pub").touch()
        with pytest.raises(ProvenanceError, match="exists already"):
            generate_key(again, made)
    assert path.read_bytes() == before and not (tmp_path / "other.pem").exists()


def test_a_passphrase(tmp_path):
    path = tmp_path / "key.pem"
    made = new_signer()
    generate_key(path, made, b"open sesame")
    assert b"ENCRYPTED" in path.read_bytes()
    assert load_signer(path, b"open sesame").public == made.public
    with pytest.raises(NeedsPassphrase):
        load_signer(path)
    with pytest.raises(ProvenanceError, match="with this passphrase"):
        load_signer(path, b"open barley")
    generate_key(tmp_path / "plain.pem", made)
    assert load_signer(tmp_path / "plain.pem", b"not needed").public == made.public


def test_files_that_hold_no_key(tmp_path, ada):
    path = tmp_path / "key.pem"
    ec = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data, message in (
        (b"", "is not a private PEM key"),
        (b"x" * 99, "is not a private"),
        (ec, "is not an Ed25519 key"),
    ):
        path.write_bytes(data)
        with pytest.raises(ProvenanceError, match=message):
            load_signer(path)
    path.unlink()
    generate_key(path, ada)
    (tmp_path / "key.pem.pub").write_text("{}")
    with pytest.raises(ProvenanceError, match=r"key.pem.pub: key 1: key_id"):
        load_signer(path)
    os.unlink(tmp_path / "key.pem.pub")
    assert load_signer(path).key_id == f"ed25519-{ada.public.fingerprint[:8]}"
    generate_key(tmp_path / "other.pem", new_signer())
    os.rename(tmp_path / "other.pem.pub", tmp_path / "key.pem.pub")
    with pytest.raises(ProvenanceError, match="is not the public half"):
        load_signer(path)


def test_trusted_files(tmp_path, ada, bob):
    pem = ada.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    private = bob.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    event = sign_event(ada, "pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF", "correction", "t", {})
    for name, data in (("ada.pem", pem), ("bob.pem", private)):
        (tmp_path / name).write_bytes(data)
    store = TrustStore()
    store.add_file(tmp_path / "ada.pem")
    assert verify(event, store).verified
    store.add_file(tmp_path / "bob.pem")
    assert bob.public.fingerprint in [key.fingerprint for key in store.keys]
    import json

    (tmp_path / "both.json").write_text(json.dumps([ada.public.as_entry(), bob.public.as_entry()]))
    store = TrustStore()
    store.add_file(tmp_path / "both.json")
    assert len(store.keys) == 3
    for data in (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"[]", b"{}", b"5", b"", b"\xff"):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(ProvenanceError, match="bad: "):
            TrustStore().add_file(tmp_path / "bad")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 201, "\x1b[31m"])
def test_names_that_cannot_be_used(name):
    for field in ("signer_id", "key_id"):
        with pytest.raises(ProvenanceError, match=f"{field} = .*: takes up to 200 printable characters"):
            new_signer(**{field: name})
