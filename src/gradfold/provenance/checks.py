"""All checks of one event, and of all events of a document; ``verify`` and ``merge`` both use them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .canonical import check_json, part_sha256_hex
from .errors import ProvenanceError
from .events import (
    ENTRY_FIELDS,
    EVENT_FIELDS,
    LISTS,
    OTHER_RECORDS,
    RECORD,
    SCHEMA_VERSION,
    SIGNER_FIELDS,
    content_sha256,
    event_of,
    is_event_id,
)
from .identity import identity_of, instant, split_number
from .keys import PublicKey, check_entry
from .plain_text import plain_text
from .report import Check, Checker, Status, brief, typed
from .signatures import EVENT_MESSAGE, RECEIPT_MESSAGE, check_signature
from .trust import REGISTRY_TYPE, RESERVED, Keyring, TrustStore

MAX_EVENTS = 100_000
ELSEWHERE = frozenset({"key", "receipt_key", "registry"})
"""Checks that may pass elsewhere: another document may list the key, another user trust the registry. All others depend
on the event alone."""


@dataclass
class CheckedEvent:
    """One event with its checks.

    Attributes:
        where: Where the event stands in the document.
        event: The event.
        checks: Its checks.
        signed: False for an event that was rebuilt from a state.
    """

    where: str
    event: Any
    checks: list[Check]
    signed: bool

    @property
    def reasons(self) -> frozenset[str]:
        """Names of the checks that failed; empty if the event is valid. Trust in keys does not matter here."""
        return frozenset(check.name for check in self.checks if check.status is Status.FAIL and check.intrinsic)


@dataclass
class Document:
    """A parsed document: its kind, its paper, its keys and its events.

    Attributes:
        kind: "bundle", "state" or "event".
        content: The JSON object.
        subject: Pith number of the paper; None if it has none.
        keys: Keys that its signatures are checked with.
        key_checks: Checks of the keys it lists.
        events: Its events.
    """

    kind: str
    content: dict[str, Any]
    subject: str | None
    keys: Keyring
    key_checks: list[Check] = field(default_factory=list)
    events: list[CheckedEvent] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Any] | None:
        """The state that the document is or contains; None if there is none."""
        return self.content if self.kind == "state" else typed(self.content, "state", dict)


def open_document(content: Any, store: TrustStore, every: bool = True) -> Document:
    """Take a bundle, a state or an event apart, and check its keys and each of its events.

    Args:
        content: The parsed document.
        store: Trusted keys.
        every: Also note checks that pass.

    Raises:
        ProvenanceError: It is none of these, or holds more than MAX_EVENTS events.
    """
    if type(content) is not dict:
        raise ProvenanceError("holds no JSON object, so no open-graph document")
    check_json(content)  # code below relies on JSON types and bounded depth
    kind = _kind(content)
    subject = content.get("subject_pith_number" if kind == "event" else "pith_number")
    document = Document(kind, content, subject if split_number(subject) else None, Keyring(store))
    if kind == "event":  # an event lists no keys: use those the user named
        document.keys = Keyring(store, store.keys)
    if kind == "bundle":
        document.keys = Keyring(store, _claimed_keys(content, store, document.key_checks))
    found = list(_events(document))
    if len(found) > MAX_EVENTS:
        raise ProvenanceError(f"holds {len(found):,} events; at most {MAX_EVENTS:,} are read")
    for where, event in found:
        at = Checker(where, every=every)
        signed = kind != "state"
        check_event(event, document.subject, document.keys, at, signed)
        document.events.append(CheckedEvent(where, event, at.checks, signed))
    return document


def check_event(event: Any, subject: str | None, keys: Keyring, at: Checker, signed: bool = True) -> None:
    """Note every check of an event.

    Args:
        event: The event.
        subject: Pith number of the paper.
        keys: Keys for its signature.
        at: Where checks are noted.
        signed: False for an event rebuilt from a state, which has no signature.
    """
    if type(event) is not dict:
        at.test("structure", False, "is {}, not an object", event)
        return
    wrong = [
        name
        for name, kinds in EVENT_FIELDS.items()
        if signed or name != "signature"
        if type(event.get(name)) not in kinds
    ]
    extra = event.keys() - EVENT_FIELDS.keys()
    if wrong:
        at.test("structure", False, f"missing or of another type: {', '.join(wrong)}")
    else:
        at.test("structure", not extra, "has fields that are unknown, such as {}", min(extra, default=""))
    at.test("event_type", event.get("event_type") in (RECORD, *LISTS), "{} is unknown", event.get("event_type"))
    at.same("schema_version", event.get("schema_version"), SCHEMA_VERSION)
    if subject is None:
        at.note("subject", Status.FAIL, "the document has no pith number")
    else:
        at.same("subject", event.get("subject_pith_number"), subject)
    at.test("created_at", instant(event.get("created_at")) is not None, "is {}, no time", event.get("created_at"))
    digest = content_sha256(event)
    at.same("content_sha256", event.get("content_sha256"), digest)
    at.same("event_id", event.get("event_id"), f"sha256:{digest}")
    supersedes = typed(event, "supersedes", list) or []
    at.test(
        "link_form",
        (not supersedes or (all(map(is_event_id, supersedes)) and len(set(supersedes)) == len(supersedes)))
        and (event.get("prev_event") is None or is_event_id(event.get("prev_event"))),
        "prev_event and supersedes take event ids, each once",
    )
    _check_signer(event, keys, at, signed)
    if signed:
        block = typed(event, "signature", dict)
        if block is None:
            at.note("signature", Status.FAIL, "the event is not signed")
        else:
            check_signature(block, digest, EVENT_MESSAGE, keys, at, not_before=event.get("created_at"))
    else:
        at.note("signature", Status.NOT_PRESENT, "a state carries no event signatures; its bundle does")
    if event.get("event_type") == RECORD:
        _check_record(event, subject, keys, at, signed)


def _check_signer(event: dict[str, Any], keys: Keyring, at: Checker, signed: bool) -> None:
    signer = typed(event, "signer", dict) or {}
    sound = signer.keys() == set(SIGNER_FIELDS) and all(type(value) is str for value in signer.values())
    if not at.test("signer", sound, f"is not an object of {', '.join(SIGNER_FIELDS)}"):
        return
    name, key_id, fingerprint = signer["signer_id"], signer["key_id"], signer["public_key_fingerprint"]
    if plain_text(signer["signer_type"]) == REGISTRY_TYPE:
        detail = "{} signs as a registry and is none; name its key with --trust-registry if it is one"
        at.test("registry", keys.store.is_registry(fingerprint), detail, name)
    # A name of the registry's is wrong for everyone, that of another trusted key for those who trust it.
    for store, intrinsic in ((RESERVED, True), (keys.store, False)):
        owner = store.owner_of(key_id)
        if owner is not None and owner.fingerprint != fingerprint:
            detail = f"{brief(key_id)} is the id of a trusted key, but this is another key"
            at.note("signer", Status.FAIL, detail, intrinsic)
        if store.impostor(name, fingerprint):
            detail = f"{brief(name)} is not the name of the signer with the key {brief(fingerprint)}"
            at.note("signer", Status.FAIL, detail, intrinsic)
    block = typed(event, "signature", dict)
    if signed and block is not None:
        at.same("signer_key_id", block.get("key_id"), key_id)
        at.same("signer_fingerprint", block.get("public_key_fingerprint"), fingerprint)


def _check_record(event: dict[str, Any], subject: str | None, keys: Keyring, at: Checker, signed: bool) -> None:
    """Check ``record_created``: that a registry made it, the canonical record, its number, and the receipt for it."""
    payload = typed(event, "payload", dict) or {}
    fingerprint = typed(typed(event, "signer", dict), "public_key_fingerprint", str)
    at.test(
        "registry",
        fingerprint is not None and keys.store.is_registry(fingerprint),
        "only a registry creates records, and {} is the key of none; name it with --trust-registry if it is one",
        fingerprint,
    )
    at.same("target", event.get("target"), "record")
    record = payload.get("canonical_record")
    if not at.test("canonical_record", type(record) is dict, "is missing or no object") or type(record) is not dict:
        return
    digest = part_sha256_hex(record)
    at.same("canonical_record_schema_version", record.get("schema_version"), SCHEMA_VERSION)
    at.same("canonical_sha256", payload.get("canonical_sha256"), digest)
    split = split_number(subject)
    at.test(
        "pith_number", split is not None and split[1] == identity_of(digest), f"the record is {identity_of(digest)}"
    )
    if split is not None:
        times = (event.get("created_at"), (typed(record, "metadata", dict) or {}).get("submitted_at"))
        years = {str(time)[:4] for time in times if instant(time)}
        at.test("pith_year", f"{split[0]:04}" in years, f"neither made nor submitted in {split[0]}")
    source = typed(record, "source", dict) or {}
    for name in ("kind", "id", "version"):
        if f"source_{name}" in payload or name in source:
            at.same(f"source_{name}", payload.get(f"source_{name}"), source.get(name))
    receipt = payload.get("receipt")
    if not at.test("receipt", type(receipt) is dict, "is missing or no object") or type(receipt) is not dict:
        return
    at.same("receipt_kind", receipt.get("kind"), "pith_receipt")
    at.same("receipt_canonical_sha256", receipt.get("canonical_sha256"), digest)
    signer = typed(event, "signer", dict) or {}
    at.same("receipt_key_id", receipt.get("key_id"), signer.get("key_id"))
    at.same("receipt_fingerprint", receipt.get("public_key_fingerprint"), signer.get("public_key_fingerprint"))
    start = receipt.get("first_computed_at")
    check_signature(receipt, digest, RECEIPT_MESSAGE, keys, at, "receipt_", start, brings_keys=signed)


def _kind(content: dict[str, Any]) -> str:
    """Return the kind of a document, by what it says or else by what it holds."""
    if "bundle_type" in content or "bundle_signature" in content or "events" in content:
        return "bundle"
    if "state_type" in content or "state_sha256" in content or "current" in content:
        return "state"
    if "event_type" in content or "event_id" in content or "content_sha256" in content:
        return "event"
    raise ProvenanceError("is no open-graph bundle, state or event")


def _claimed_keys(content: dict[str, Any], store: TrustStore, checks: list[Check]) -> list[PublicKey]:
    """Return the sound entries of a bundle's ``public_keys``."""
    at = Checker("public_keys", checks)
    entries = content.get("public_keys")
    if not at.test("structure", type(entries) is list, f"is {brief(entries)}, not a list") or type(entries) is not list:
        return []
    if len(entries) > MAX_EVENTS:
        raise ProvenanceError(f"lists {len(entries):,} keys")
    keys: list[PublicKey] = []
    by_id: dict[str, bytes] = {}
    by_key: dict[bytes, str | None] = {}
    for number, entry in enumerate(entries):
        here = at.at(f"public_keys[{number}]")
        key = check_entry(entry, here)
        if key is None:
            continue
        if entry.get("rotates_at") is not None:
            here.note("rotates_at", Status.NOT_CHECKED, "what a rotated key may still sign is not known")
        owner = store.owner_of(key.key_id or "")
        if owner is not None and owner.raw != key.raw:
            here.note("key_id", Status.FAIL, f"{brief(key.key_id)} is the id of a trusted key, but this is another key")
        elif by_id.setdefault(plain_text(key.key_id or ""), key.raw) != key.raw:
            here.note("key_id", Status.FAIL, f"{brief(key.key_id)} is given to two keys")
        elif by_key.setdefault(key.raw, key.key_id) != key.key_id:
            here.note("key_id", Status.FAIL, f"{brief(key.key_id)} is a key that is listed as another one too")
        keys.append(key)
    return keys


def _events(document: Document) -> Iterator[tuple[str, Any]]:
    """Yield (where, event) of everything that should be an event."""
    content = document.content
    if document.kind == "event":
        yield "event", content
    elif document.kind == "bundle":
        for number, event in enumerate(typed(content, "events", list) or []):
            yield f"events[{number}]", event
    else:
        yield from _rebuilt(typed(content, "current", dict) or {}, document.subject or "")


def _rebuilt(current: dict[str, Any], subject: str) -> Iterator[tuple[str, Any]]:
    """Rebuild the events of a state's entries."""
    entries = (
        [("record_created", RECORD, current["record_created"])] if current.get("record_created") is not None else []
    )
    for event_type, name in ((RECORD, OTHER_RECORDS), *LISTS.items()):
        entries += [(f"{name}[{n}]", event_type, entry) for n, entry in enumerate(typed(current, name, list) or [])]
    for where, event_type, entry in entries:
        # What has other fields than an entry is checked as it stands, and fails.
        is_entry = type(entry) is dict and entry.keys() <= ENTRY_FIELDS
        yield f"current.{where}", event_of(entry, event_type, subject) if is_entry else entry


def claimed_id(event: Any) -> str | None:
    """Return the id an event gives itself, if it has the form of one."""
    value = event.get("event_id") if type(event) is dict else None
    return value if is_event_id(value) else None
