"""An event's parts: the types there are, its digest, its entry in a state, and the way back from that entry."""

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
"""Event type -> the list of the state that its events land in. `record_created` has a place of its own."""

OTHER_RECORDS = "other_records_created"
"""Where a state keeps a second `record_created`, if there is one, so that merging loses nothing."""

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
"""What an event is made of, and nothing else: a state could not give back what is not here."""

ENTRY_FIELDS = frozenset({"event_id", "target", "created_at", "signer", "payload", "supersedes", "prev_event"})
"""What a state keeps of an event; the last two only where they say something."""

_DIGEST, _EVENT_ID = re.compile("[0-9a-f]{64}"), re.compile("sha256:[0-9a-f]{64}")
SIGNER_FIELDS = ("signer_id", "signer_type", "key_id", "public_key_fingerprint")


def content_sha256(event: dict[str, Any]) -> str:
    """The digest that an event's id repeats and its signature covers, of an event known to be JSON."""
    return part_sha256_hex(without(event, "event_id", "content_sha256", "signature"))


def is_event_id(value: Any) -> bool:
    """Whether a value has the form `sha256:` and 64 hex digits."""
    return type(value) is str and _EVENT_ID.fullmatch(value) is not None


def is_digest(value: Any) -> bool:
    """Whether a value has the form of a SHA-256 in lower-case hex."""
    return type(value) is str and _DIGEST.fullmatch(value) is not None


def entry_of(event: dict[str, Any]) -> dict[str, Any]:
    """What a state keeps of an event. Links only where there are any, as the published states have none."""
    entry = {key: event[key] for key in ("event_id", "target", "created_at", "signer", "payload")}
    if event["supersedes"]:
        entry["supersedes"] = event["supersedes"]
    if event["prev_event"] is not None:
        entry["prev_event"] = event["prev_event"]
    return entry


def event_of(entry: dict[str, Any], event_type: str, subject: str) -> dict[str, Any]:
    """The event that a state's entry was made of, without its signature. Its id tells whether it is that event."""
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
    """Where an event stands among a state's: the record first, then by time, then by id."""
    return event["event_type"] != RECORD, instant(event["created_at"]), event["event_id"]
