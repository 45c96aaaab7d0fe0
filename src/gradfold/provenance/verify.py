"""Verify a bundle, a state or one event: all checks, listed one by one."""

from __future__ import annotations

import hashlib
from typing import Any

from .canonical import part_sha256_hex, without
from .checks import Document, claimed_id, open_document
from .errors import ProvenanceError
from .events import RECORD, SCHEMA_VERSION, is_event_id
from .identity import identity_of, instant, short_number, source_aliases, split_number
from .links import check_links
from .merge import MERGE_VERSION, STATE_TYPE, STATE_VERSION, pool_of, state_of
from .report import Checker, Status, Verification, brief, differ, first_difference, typed
from .signatures import BUNDLE_MESSAGE, BUNDLE_TYPE, BUNDLE_VERSION, check_signature
from .trust import KNOWN_SIGNATURES, TrustStore
from .vocabulary import check_words

SIGNATURES = frozenset({"signature", "receipt_signature", "bundle_signature"})
SIGNED_EVENT = "signed_event"
"""Name of the check that an event has a signature of its own, where it needs one."""
BESIDE_RECEIPT = frozenset({RECORD, "graph_snapshot"})
"""Types of events that a state may hold without their signatures: the registry's own word on a record it receipted."""


def verify(content: Any, store: TrustStore | None = None, *, require_signed_events: bool = False) -> Verification:
    """Check a parsed document.

    Args:
        content: The parsed document.
        store: Trusted keys; None for the registry's.
        require_signed_events: Fail every event without a signature of its own, so every event of a state.

    Returns:
        Every check. Whatever is wrong with the document is in there.

    Raises:
        ProvenanceError: It is not a bundle, state or event, or holds too many events.
    """
    document = open_document(content, TrustStore() if store is None else store)
    report = Verification(document.kind, document.subject, list(document.key_checks))
    at = Checker(document.kind, report.checks)
    for found in document.events:
        report.checks.extend(found.checks)
    if document.kind == "event":
        at.test("pith_number", document.subject is not None, "subject_pith_number is no pith number")
    else:
        at.test("pith_number", document.subject is not None, f"is {brief(content.get('pith_number'))}, no pith number")
        _check_identity(document, at)
        _check_events(document, at)
    check_links(document, at)
    if document.kind == "bundle":
        _check_bundle(document, at)
    _check_state(document, at.at("state"))
    if document.kind == "state":
        _check_unsigned(document, report, require_signed_events)
    check_words(document, report.checks)
    _note_the_unchecked(document, report)
    report.trusted_signatures = sum(check.status is Status.PASS and check.name in SIGNATURES for check in report.checks)
    return report


def _check_identity(document: Document, at: Checker) -> None:
    """Check the record in the document, its number and its aliases."""
    content, subject = document.content, document.subject
    holder = content if document.kind == "bundle" else typed(content, "current", dict) or {}
    record = typed(holder, "canonical_record", dict)
    found = holder.get("canonical_record")
    if not at.test("canonical_record", record is not None, f"is {brief(found)}, not an object") or record is None:
        return
    digest = part_sha256_hex(record)
    at.same("canonical_record_schema_version", record.get("schema_version"), SCHEMA_VERSION)
    split = split_number(subject)
    at.test(
        "pith_number_of_record",
        split is not None and split[1] == identity_of(digest),
        f"should be {identity_of(digest)}",
    )
    if document.kind == "bundle":
        at.same("canonical_sha256", content.get("canonical_sha256"), digest)
        at.same("short_pith_number", content.get("short_pith_number"), short_number(subject) if subject else None)
        _same_json(at, "source", content.get("source"), record.get("source"))
    _check_aliases(holder.get("source_aliases"), record, subject, at)
    for found in document.events:
        if type(found.event) is dict and found.event.get("event_type") == RECORD:
            payload = typed(found.event, "payload", dict) or {}
            _same_json(at, "canonical_record_of_event", payload.get("canonical_record"), record)


def _check_aliases(found: Any, record: dict[str, Any], subject: str | None, at: Checker) -> None:
    """Check the aliases. Each needs a time, which is only known in a state, where it is the event's."""
    if subject is None or not at.test("source_aliases", type(found) is list, f"is {brief(found)}, not a list"):
        return
    plain = [without(alias, "created_at") if type(alias) is dict else alias for alias in found]
    expected = [without(alias, "created_at") for alias in source_aliases(record, subject, "")]
    _same_json(at, "aliases", plain, expected)
    at.test("alias_times", all(instant(typed(alias, "created_at", str)) for alias in found), "an alias has no time")


def _check_events(document: Document, at: Checker) -> None:
    """Check that every event is there once, and that there are as many as stated."""
    content = document.content
    if document.kind == "bundle":
        at.test("events", type(content.get("events")) is list, f"is {brief(content.get('events'))}, not a list")
    seen: set[str] = set()
    twice: set[str] = set()
    for found in document.events:
        event_id = claimed_id(found.event)
        if event_id is not None:
            (twice if event_id in seen else seen).add(event_id)
    at.test("duplicate_events", not twice, f"{min(twice, default='')} is there twice")
    applied = typed(document.state, "applied_event_ids", list)
    if not at.test("applied_event_ids", applied is not None, "is missing or no list") or applied is None:
        return
    listed = {event_id for event_id in applied if is_event_id(event_id)}
    at.test("missing_events", listed <= seen, f"{min(listed - seen, default='')} was applied, but is not here")
    valid = {found.event["event_id"] for found in document.events if not found.reasons}
    at.test("unapplied_events", valid <= listed, f"{min(valid - listed, default='')} is here, but was not applied")
    records = sum(type(found.event) is dict and found.event.get("event_type") == RECORD for found in document.events)
    if records:
        at.note(RECORD, Status.PASS)
    elif document.kind == "bundle":
        at.note(RECORD, Status.NOT_PRESENT, "nothing in it is the registry's word on the record")
    else:
        at.note(RECORD, Status.FAIL, "is missing, and with it the only signature in a state")


def _check_bundle(document: Document, at: Checker) -> None:
    """Check versions, digest and signature of the whole bundle."""
    content = document.content
    at.same("bundle_type", content.get("bundle_type"), BUNDLE_TYPE)
    at.same("bundle_version", content.get("bundle_version"), BUNDLE_VERSION)
    at.same("merge_version", content.get("merge_version"), MERGE_VERSION)
    at.test("built_at", instant(content.get("built_at")) is not None, f"is {brief(content.get('built_at'))}, no time")
    for name in ("mirror_hints", "timestamp_proofs"):
        value = content.get(name)
        if value is None or value == []:
            at.note(name, Status.NOT_PRESENT)
        elif at.test(name, type(value) is list, f"is {brief(value)}, not a list"):
            at.note(f"{name}_contents", Status.NOT_CHECKED, "covered by the bundle's signature")
    block = typed(content, "bundle_signature", dict)
    if not at.test("bundle_signature_block", block is not None, "is missing or no object") or block is None:
        return
    digest = part_sha256_hex(without(content, "bundle_signature"))
    at.same("bundle_sha256", block.get("bundle_sha256"), digest)
    check_signature(
        block, digest, BUNDLE_MESSAGE, document.keys, at, prefix="bundle_", not_before=content.get("built_at")
    )
    last = max((time for found in document.events if (time := _signing_time(found.event)) is not None), default=None)
    time = instant(block.get("signed_at"))
    at.test("bundle_signed_last", last is None or time is None or last <= time, "an event was signed after the bundle")
    if digest in KNOWN_SIGNATURES:
        same = part_sha256_hex(block) == KNOWN_SIGNATURES[digest]
        at.test("bundle_signature_as_published", same, "is not the signature that was published with this bundle")
    else:
        at.note("bundle_signed_at_itself", Status.NOT_CHECKED, "no digest covers a bundle signature's own time")


def _check_state(document: Document, at: Checker) -> None:
    """Check the state's digest, and every part of it against the state that the events make."""
    state = document.state
    if document.kind == "event":
        return
    if not at.test("state", state is not None, "is missing or no object") or state is None:
        return
    at.same("state_type", state.get("state_type"), STATE_TYPE)
    at.same("state_version", state.get("state_version"), STATE_VERSION)
    at.same("merge_version", state.get("merge_version"), MERGE_VERSION)
    at.same("state_sha256", state.get("state_sha256"), part_sha256_hex(without(state, "state_sha256")))
    if document.subject is None:
        at.note("recomputed", Status.NOT_CHECKED, "without a pith number there is no state to compute")
        return
    try:
        expected = state_of(document.subject, pool_of(document))
    except ProvenanceError as error:
        at.note("recomputed", Status.FAIL, str(error))
        return
    current = typed(state, "current", dict) or {}
    for name in sorted(expected["current"].keys() | current.keys()):
        _same_json(at, f"recomputed_{name}", current.get(name), expected["current"].get(name))
    for name in sorted((expected.keys() | state.keys()) - {"current", "state_sha256"}):
        _same_json(at, f"recomputed_{name}", state.get(name), expected.get(name))
    at.same("recomputed_state_sha256", state.get("state_sha256"), expected["state_sha256"])
    if document.kind == "bundle":
        _same_json(at, "aliases_of_bundle", document.content.get("source_aliases"), _aliases_due(document, expected))


def _check_unsigned(document: Document, report: Verification, require_signed_events: bool) -> None:
    """Fail what a state says without a signature, but for the registry's own events beside its receipt."""
    receipted = {
        typed(found.event["signer"], "public_key_fingerprint", str)
        for found in document.events
        if not found.reasons and found.event["event_type"] == RECORD
    }
    for found in document.events:
        if found.signed or type(found.event) is not dict:
            continue
        at = Checker(found.where, report.checks)
        signer = typed(typed(found.event, "signer", dict), "public_key_fingerprint", str)
        if require_signed_events:
            at.test(SIGNED_EVENT, False, "a state carries no signature of it, and signed events are required")
        elif found.event.get("event_type") not in BESIDE_RECEIPT or signer not in receipted:
            at.test(SIGNED_EVENT, False, "unsigned claim in the registry's name: ask for the bundle that it is in")


def _aliases_due(document: Document, state: dict[str, Any]) -> Any:
    """Return the aliases that a bundle should list: those of its state, if that has a record."""
    aliases = state["current"]["source_aliases"]
    return aliases if aliases else document.content.get("source_aliases")


def _note_the_unchecked(document: Document, report: Verification) -> None:
    """Note what only the registry could check, so that silence is not taken for a pass."""
    for found in document.events:
        payload = typed(found.event, "payload", dict) if type(found.event) is dict else None
        snapshot = typed(payload, "graph_snapshot", dict)
        if snapshot is None:
            continue
        at = Checker(found.where, report.checks)
        parts = [name for name, part in sorted(snapshot.items()) if type(part) is dict and "snapshot_sha256" in part]
        if parts:
            detail = f"how the registry makes them is not known; of {', '.join(parts)[:200]}"
            at.note("snapshot_sha256", Status.NOT_CHECKED, detail)
        _check_title(document, typed(snapshot, "paper", dict) or {}, at)


def _check_title(document: Document, paper: dict[str, Any], at: Checker) -> None:
    """Compare the record's title digest with that of the lower-cased title, as in the published documents."""
    holder = document.content if document.kind == "bundle" else typed(document.content, "current", dict)
    metadata = typed(typed(holder, "canonical_record", dict), "metadata", dict)
    title, expected = typed(paper, "title", str), typed(metadata, "title_canon_sha256", str)
    if title is not None and expected is not None:
        if hashlib.sha256(title.lower().encode("utf-8")).hexdigest() == expected:
            at.note("title_canon_sha256", Status.PASS)
        else:
            at.note(
                "title_canon_sha256",
                Status.NOT_CHECKED,
                "not the digest of the title in lower case; no other rule is known",
            )
        at.note("abstract_canon_sha256", Status.NOT_CHECKED, "documents hold an excerpt of the abstract only")


def _signing_time(event: Any) -> tuple[str, str] | None:
    return instant((typed(event, "signature", dict) or {}).get("signed_at")) if type(event) is dict else None


def _same_json(at: Checker, name: str, found: Any, expected: Any) -> None:
    """Note whether two values have the same canonical form (1, 1.0 and True differ)."""
    same = found is expected or not differ(found, expected)
    at.test(name, same, "" if same else first_difference(found, expected))
