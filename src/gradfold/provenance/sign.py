"""Private keys, signed events, and bundles that hold those events beside a paper's."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from .canonical import canonical_bytes, sha256_hex, without
from .errors import ChecksFailed, ProvenanceError
from .events import LISTS, SCHEMA_VERSION, content_sha256, is_event_id
from .files import read_bytes, write_secret
from .identity import instant, short_number
from .keys import PublicKey, default_key_id, raw_public, read_keys
from .merge import MERGE_VERSION, merge, slot_of
from .plain_text import plain_text
from .report import Verification, typed
from .signatures import ALGORITHM, BUNDLE_MESSAGE, BUNDLE_TYPE, BUNDLE_VERSION, EVENT_MESSAGE, SIGNED
from .trust import TrustStore
from .verify import verify

SIGNER_TYPE = "independent"


@dataclass(frozen=True)
class Signer:
    """A private key with the names that its signatures carry."""

    private: Ed25519PrivateKey
    key_id: str
    signer_id: str
    signer_type: str = SIGNER_TYPE

    @property
    def public(self) -> PublicKey:
        """The public key."""
        return PublicKey(raw_public(self.private), self.key_id, self.signer_id)

    def describe(self) -> dict[str, str]:
        """Return the signer as events name it."""
        return {
            "signer_id": self.signer_id,
            "signer_type": self.signer_type,
            "key_id": self.key_id,
            "public_key_fingerprint": self.public.fingerprint,
        }

    def sign(self, digest: str, message: str, signed_at: str) -> dict[str, str]:
        """Return a signature block over a digest (64 hex digits); ``message`` says which kind of digest it is."""
        return {
            "signature_status": SIGNED,
            "algorithm": ALGORITHM,
            "key_id": self.key_id,
            "public_key_fingerprint": self.public.fingerprint,
            "signature_b64": base64.b64encode(self.private.sign(bytes.fromhex(digest))).decode("ascii"),
            "signed_message": message,
            "signed_at": signed_at,
        }


def signer_for(private: Ed25519PrivateKey, signer_id: str | None = None, key_id: str | None = None) -> Signer:
    """Return a signer with these names, or with names made of the key's fingerprint.

    Raises:
        ProvenanceError: A name cannot be used.
    """
    key_id = default_key_id(PublicKey(raw_public(private))) if key_id is None else key_id
    for name, value in (("signer_id", signer_id), ("key_id", key_id)):
        if value is not None and not (value.strip() and value.isprintable() and len(value) <= 200):
            raise ProvenanceError(f"{name} = {value[:60]!r}: takes up to 200 printable characters")
    return Signer(private, key_id, key_id if signer_id is None else signer_id)


def generate_key(path: str | os.PathLike[str], signer: Signer, passphrase: bytes | None = None) -> None:
    """Write a signer's private key as PEM, readable by its owner only, and the public key beside it as ``PATH.pub``.

    Raises:
        ProvenanceError: One of the files exists.
    """
    public_path = f"{os.fspath(path)}.pub"
    if os.path.lexists(public_path):
        raise ProvenanceError(f"{public_path}: exists already; name another file")
    lock = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    write_secret(path, signer.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    try:
        write_secret(public_path, canonical_bytes(signer.public.as_entry()) + b"\n")
        os.chmod(public_path, 0o644)
    except BaseException:
        os.unlink(path)
        raise


def new_signer(signer_id: str | None = None, key_id: str | None = None) -> Signer:
    """Return a signer with a new key.

    Raises:
        ProvenanceError: A name cannot be used.
    """
    return signer_for(Ed25519PrivateKey.generate(), signer_id, key_id)


def load_signer(
    path: str | os.PathLike[str],
    passphrase: bytes | None = None,
    signer_id: str | None = None,
    key_id: str | None = None,
) -> Signer:
    """Load a signer's private key from a file; names that are not given are read from ``PATH.pub``.

    Raises:
        ProvenanceError: The file holds no usable key.
        NeedsPassphrase: The key is locked and no passphrase is given.
    """
    private = load_key(path, passphrase)
    public_path = f"{os.fspath(path)}.pub"
    if os.path.exists(public_path):
        try:
            (public, *others) = read_keys(read_bytes(public_path, 2**20))
        except ProvenanceError as error:
            raise ProvenanceError(f"{public_path}: {error}") from None
        if others or public.raw != raw_public(private):
            raise ProvenanceError(f"{public_path}: is not the public half of {path}")
        signer_id = public.signer_id if signer_id is None else signer_id
        key_id = public.key_id if key_id is None else key_id
    return signer_for(private, signer_id, key_id)


def load_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        ProvenanceError: The file holds no usable key.
        NeedsPassphrase: The key is locked and no passphrase is given.
    """
    data = read_bytes(path, 2**16)
    try:
        key = load_pem_private_key(data, password=passphrase)
    except TypeError:
        if passphrase is None:
            raise NeedsPassphrase(f"{path}: has a passphrase; give it with --passphrase-file FILE") from None
        return load_key(path)  # a passphrase for a key that has none
    except (ValueError, UnsupportedAlgorithm):
        wrong = " with this passphrase" if passphrase else ""
        raise ProvenanceError(f"{path}: is not a private PEM key that can be read{wrong}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ProvenanceError(f"{path}: is not an Ed25519 key; make one with `gradfold record keygen`")
    return key


class NeedsPassphrase(ProvenanceError):
    """A private key is locked with a passphrase."""


def sign_event(
    signer: Signer,
    subject: str,
    event_type: str,
    target: str,
    payload: dict[str, Any],
    *,
    prev_event: str | None = None,
    supersedes: list[str] | None = None,
    created_at: str | None = None,
) -> dict[str, Any]:
    """Return a signed event about the paper ``subject`` (its pith number).

    Args:
        signer: Who signs.
        subject: Pith number of the paper.
        event_type: Any type but ``record_created``, which only the registry may sign.
        target: What the event is about.
        payload: What it says.
        supersedes: Ids of events that this one replaces.
        prev_event: Id of the signer's event before this one.
        created_at: Time of the event; None for now.

    Raises:
        ProvenanceError: An argument cannot be used.
    """
    short_number(subject)
    if event_type not in LISTS:
        raise ProvenanceError(f"event type {event_type[:60]!r}: takes {', '.join(LISTS)}")
    if created_at is not None and instant(created_at) is None:
        raise ProvenanceError(f"created_at = {created_at[:60]!r}: takes a time such as 2026-05-21T01:05:41Z")
    if not plain_text(target):
        raise ProvenanceError("an event takes a target: what it is about")
    links = supersedes or []
    if not all(map(is_event_id, [*links, *([prev_event] if prev_event is not None else [])])):
        raise ProvenanceError("prev_event and supersedes take event ids: sha256: and 64 hex digits")
    return seal(
        signer,
        {
            "event_type": event_type,
            "subject_pith_number": subject,
            "target": target,
            "payload": payload,
            "signer": signer.describe(),
            "created_at": created_at or now(),
            "supersedes": sorted(set(links)),
            "prev_event": prev_event,
            "schema_version": SCHEMA_VERSION,
        },
    )


def seal(signer: Signer, content: dict[str, Any]) -> dict[str, Any]:
    """Complete an event's content with its digest, id and signature.

    Raises:
        ProvenanceError: The content has no canonical form.
    """
    canonical_bytes(content)
    digest = content_sha256(content)
    return {
        **content,
        "content_sha256": digest,
        "event_id": f"sha256:{digest}",
        "signature": signer.sign(digest, EVENT_MESSAGE, _latest(now(), content["created_at"])),
    }


def append(
    paper: dict[str, Any],
    signer: Signer,
    event_type: str,
    target: str,
    payload: dict[str, Any],
    *,
    supersedes: list[str] | None = None,
    mirror_hints: list[dict[str, Any]] | None = None,
    store: TrustStore | None = None,
) -> dict[str, Any]:
    """Return a signed bundle of a paper's events and a new one.

    The new event follows the signer's last event of that type and target.

    Raises:
        ChecksFailed: ``paper`` (a bundle or a state) does not verify with ``store`` and the signer's own key.
        ProvenanceError: An argument cannot be used.
    """
    store = _store_that_trusts(paper, signer, store)
    subject = paper["pith_number"]
    follows = _last_event(merge([paper], store), signer, event_type, target)
    event = sign_event(signer, subject, event_type, target, payload, prev_event=follows, supersedes=supersedes)
    return build_bundle(paper, signer, [event], mirror_hints=mirror_hints, store=store)


def build_bundle(
    paper: dict[str, Any],
    signer: Signer,
    events: list[dict[str, Any]] | None = None,
    *,
    mirror_hints: list[dict[str, Any]] | None = None,
    store: TrustStore | None = None,
) -> dict[str, Any]:
    """Return a signed bundle of a paper's events and ``events``, with its state.

    Events of a paper known as a state have no signatures: the bundle then holds the new events only, and is merged
    with that state. Nothing is signed that would not verify.

    Raises:
        ChecksFailed: The paper or an event fails its checks.
        ProvenanceError: An argument cannot be used.
    """
    store = _store_that_trusts(paper, signer, store)
    is_state = "bundle_type" not in paper
    subject = paper["pith_number"]
    record = paper["current"]["canonical_record"] if is_state else paper["canonical_record"]
    known = [] if is_state else list(paper["events"])
    ids = {event["event_id"] for event in known}
    bundle: dict[str, Any] = {
        "bundle_type": BUNDLE_TYPE,
        "bundle_version": BUNDLE_VERSION,
        "pith_number": subject,
        "short_pith_number": short_number(subject),
        "canonical_record": record,
        "canonical_sha256": sha256_hex(record),
        "source": record.get("source"),
        "source_aliases": paper["current"]["source_aliases"] if is_state else paper["source_aliases"],
        "events": known + [event for event in events or [] if event["event_id"] not in ids],
        "timestamp_proofs": typed(paper, "timestamp_proofs", list) or [],
        "mirror_hints": [*(typed(paper, "mirror_hints", list) or []), *(mirror_hints or [])],
        "public_keys": _keys_with(typed(paper, "public_keys", list) or [], signer),
        "merge_version": MERGE_VERSION,
    }
    bundle["state"] = merge([bundle], store)
    if bundle["state"]["invalid_events"]:
        reasons = sorted({reason for found in bundle["state"]["invalid_events"] for reason in found["reasons"]})
        raise ChecksFailed(f"an event fails its checks ({', '.join(reasons)}); nothing was signed")
    bundle["built_at"] = _latest(now(), *(event["signature"]["signed_at"] for event in bundle["events"]))
    bundle["bundle_signature"] = sign_bundle(bundle, signer)
    _refuse_unless_verified(verify(bundle, store), "bundle would not verify")  # a link to what is not in it, say
    return bundle


def sign_bundle(bundle: dict[str, Any], signer: Signer) -> dict[str, Any]:
    """Return the ``bundle_signature`` of a bundle, ignoring the one it has.

    Raises:
        ProvenanceError: The bundle has no canonical form.
    """
    digest = sha256_hex(without(bundle, "bundle_signature"))
    return {**signer.sign(digest, BUNDLE_MESSAGE, _latest(now(), bundle["built_at"])), "bundle_sha256": digest}


def mirror_hint(url: str, name: str | None = None) -> dict[str, Any]:
    """Return an entry of a bundle's ``mirror_hints``: where a copy of it will be found.

    Raises:
        ProvenanceError: The URL cannot be used.
    """
    host = url.split("/")[2] if url.startswith("https://") else ""
    if not host or not url.isprintable() or " " in url or len(url) > 2000:
        raise ProvenanceError(f"mirror {url[:60]!r}: takes an address that begins with https://")
    return {"mirror_type": "https", "name": name or host, "bundle_url": url, "status": "mirror"}


def now() -> str:
    """Return the current second in the form of the documents."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _store_that_trusts(paper: dict[str, Any], signer: Signer, store: TrustStore | None) -> TrustStore:
    """Return the trust store with the signer's own key.

    Raises:
        ChecksFailed: The paper does not verify with it.
    """
    widened = (TrustStore() if store is None else store).with_key(signer.public)
    report = verify(paper, widened)
    if report.kind == "event":
        raise ProvenanceError("is a single event; name the paper's bundle or state")
    _refuse_unless_verified(report, f"paper's {report.kind} is not verified")
    return widened


def _refuse_unless_verified(report: Verification, what: str) -> None:
    if not report.verified:
        first = (report.failures or report.untrusted or report.checks)[0]
        raise ChecksFailed(f"the {what}: {first.where} {first.name}: {first.detail}")


def _latest(*times: str) -> str:
    """Return a time that is not before the given ones: a slow clock must not date a signature before its content."""
    return max(times, key=lambda time: instant(time) or ("", ""))


def _last_event(state: dict[str, Any], signer: Signer, event_type: str, target: str) -> str | None:
    """Return the signer's event of this type and target that no other of theirs follows; of several, the latest."""
    fingerprint = signer.public.fingerprint
    own = [
        entry
        for entry in state["current"].get(LISTS.get(event_type, ""), [])
        if slot_of(event_type, entry["target"]) == slot_of(event_type, target)
        and entry["signer"]["public_key_fingerprint"] == fingerprint
    ]
    followed = {entry.get("prev_event") for entry in own}
    ends = [entry["event_id"] for entry in own if entry["event_id"] not in followed]
    return ends[-1] if ends else None


def _keys_with(entries: list[Any], signer: Signer) -> list[Any]:
    own = signer.public
    if any(typed(entry, "public_key_hex", str) == own.raw.hex() for entry in entries):
        return entries
    return [*entries, own.as_entry()]
