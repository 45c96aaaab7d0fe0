"""Events: their types, their digest, their entry in a state, and how an event is rebuilt from its entry."""

from __future__ import annotations

import re
from typing import Any

from .canonical import part_sha256_hex, without
from .identity import instant

SCHEMA_VERSION = "1.0"
RECORD = "record_created"
LISTS = {
    "graph_snapshot": "graph_snapshots",
    "author_attestation": "author_attestations",
    "timestamp_anchor": "timestamp_anchors",
    "storage_attestation": "storage_attestations",
    "citation_signature": "citation_signatures",
    "replication_record": "replication_records",
    "correction": "corrections",
    "mirror_hint": "mirror_hints",
}
"""Event type -> name of the list in a state that holds its events. ``record_created`` has a place of its own."""

OTHER_RECORDS = "other_records_created"
"""Name of the list for further ``record_created`` events, so that merging loses nothing."""

EVENT_FIELDS: dict[str, tuple[type, ...]] = {
    "event_type": (str,),
    "subject_pith_number": (str,),
    "target": (str,),
    "payload": (dict,),
    "signer": (dict,),
    "created_at": (str,),
    "supersedes": (list,),
    "prev_event": (str, type(None)),
    "schema_version": (str,),
    "content_sha256": (str,),
    "event_id": (str,),
    "signature": (dict,),
}
"""Fields of an event and their types. Others are not allowed, since a state could not give them back."""

ENTRY_FIELDS = frozenset({"event_id", "target", "created_at", "signer", "payload", "supersedes", "prev_event"})
"""Fields of an event that a state keeps; the last two only if they are not empty."""

_DIGEST, _EVENT_ID = re.compile("[0-9a-f]{64}"), re.compile("sha256:[0-9a-f]{64}")
SIGNER_FIELDS = ("signer_id", "signer_type", "key_id", "public_key_fingerprint")


def content_sha256(event: dict[str, Any]) -> str:
    """Return the digest that the event's id repeats and its signature covers; the event must be JSON."""
    return part_sha256_hex(without(event, "event_id", "content_sha256", "signature"))


def is_event_id(value: Any) -> bool:
    """Return whether a value has the form ``sha256:`` and 64 hex digits."""
    return type(value) is str and _EVENT_ID.fullmatch(value) is not None


def is_digest(value: Any) -> bool:
    """Return whether a value has the form of a SHA-256 in lower-case hex."""
    return type(value) is str and _DIGEST.fullmatch(value) is not None


def entry_of(event: dict[str, Any]) -> dict[str, Any]:
    """Return what a state keeps of an event; links only if there are any, as in the published states."""
    entry = {key: event[key] for key in ("event_id", "target", "created_at", "signer", "payload")}
    if event["supersedes"]:
        entry["supersedes"] = event["supersedes"]
    if event["prev_event"] is not None:
        entry["prev_event"] = event["prev_event"]
    return entry


def event_of(entry: dict[str, Any], event_type: str, subject: str) -> dict[str, Any]:
    """Rebuild the event of a state's entry, without its signature. Its id shows whether it is that event."""
    event = {
        "supersedes": [],
        "prev_event": None,
        **without(entry, "event_id"),
        "event_type": event_type,
        "subject_pith_number": subject,
        "schema_version": SCHEMA_VERSION,
    }
    event["content_sha256"] = content_sha256(event)
    event["event_id"] = entry.get("event_id")
    return event


def order_of(event: dict[str, Any]) -> tuple[Any, ...]:
    """Return the sort key of an event in a state: the record first, then by time, then by id."""
    return event["event_type"] != RECORD, instant(event["created_at"]), event["event_id"]
