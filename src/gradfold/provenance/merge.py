"""``pith-open-graph-merge-v1``: merge the events of any number of documents, in any order, into one state.

A document is reduced to a *pool*: its valid events by id, and its invalid ones by digest with the reasons. Pools are
joined like sets, and a state is a function of the joined pool. Merging is therefore permutation-invariant, idempotent
and associative, also by way of states, which are documents themselves.

Rules beyond those that the published documents show:

- An event is judged within its own document, with the keys that document lists and the trusted ones. A valid copy
  anywhere makes an event valid. Trust plays no part, so that everyone computes the same state, with one exception: a
  ``record_created`` is valid only from a registry, the built-in one or one that the user trusts as a registry.
- Entries of a state are accepted if their ids are right: a state carries no event signatures.
- Order: ``record_created`` first, then by ``created_at``, then by id. A second ``record_created`` goes to a separate
  list.
- Invalid events are set aside under the digest of the whole event, with the names of the checks that failed. An event
  that only lacked a key leaves the list once the same event is found valid.
- **Equivocation**: two or more valid events by one key with the same type and target that follow the same earlier
  event of that key, type and target, or none, and none of which names another in ``supersedes``. Targets are compared
  as ``plain_text``. An event follows another only if ``prev_event`` leads there over valid events of the same key; a
  link to anything else excuses nothing. All of them stay in their lists, and their ids are listed in
  ``equivocations``. An event that its own signer superseded is not counted; nobody else can resolve an equivocation for
  them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .canonical import part_sha256_hex
from .checks import ELSEWHERE, MAX_EVENTS, Document, claimed_id, open_document
from .errors import ProvenanceError
from .events import LISTS, OTHER_RECORDS, RECORD, entry_of, is_digest, is_event_id, order_of
from .identity import source_aliases
from .plain_text import plain_text
from .report import brief, typed
from .trust import TrustStore

MERGE_VERSION = "pith-open-graph-merge-v1"
STATE_TYPE, STATE_VERSION = "pith_open_graph_state", "1.0"


@dataclass(frozen=True)
class SetAside:
    """An invalid event: digest of the whole event, the id it gives itself, and the checks it failed."""

    event_sha256: str
    event_id: str | None
    reasons: frozenset[str]


@dataclass
class Pool:
    """Events collected by merging.

    Attributes:
        valid: Valid events by id.
        invalid: Invalid events by digest.
        unsigned: Ids of valid events that come from states only.
    """

    valid: dict[str, dict[str, Any]] = field(default_factory=dict)
    invalid: dict[str, SetAside] = field(default_factory=dict)
    unsigned: set[str] = field(default_factory=set)

    def set_aside(self, found: SetAside) -> None:
        """Add an invalid event, or further reasons to it."""
        known = self.invalid.get(found.event_sha256)
        reasons = found.reasons | known.reasons if known else found.reasons
        # A missing key counts only if nothing else is wrong; else the result would depend on the order of merging.
        self.invalid[found.event_sha256] = SetAside(found.event_sha256, found.event_id, reasons - ELSEWHERE or reasons)

    def join(self, other: Pool) -> None:
        """Add everything of another pool."""
        for event_id, event in other.valid.items():
            if event_id not in self.valid:
                self.valid[event_id] = event
                if event_id in other.unsigned:
                    self.unsigned.add(event_id)
            elif event_id not in other.unsigned:
                self.unsigned.discard(event_id)
        for found in other.invalid.values():
            self.set_aside(found)

    def remaining(self) -> list[SetAside]:
        """Return invalid events in order of digest, without those that lacked a key here and are valid elsewhere."""
        return [
            found
            for _, found in sorted(self.invalid.items())
            if not (found.reasons <= ELSEWHERE and found.event_id in self.valid)
        ]


class Merger:
    """Merges documents one by one; a document may be dropped once it was added."""

    def __init__(self, store: TrustStore | None = None):
        self.store = TrustStore() if store is None else store
        self.subject: str | None = None
        self.pool = Pool()

    def add(self, content: Any) -> None:
        """Add a bundle, a state or an event.

        Raises:
            ProvenanceError: It cannot be read, or is about another paper.
        """
        document = open_document(content, self.store, every=False)
        if document.subject is None:
            raise ProvenanceError(f"is a {document.kind} without a pith number")
        if self.subject not in (None, document.subject):
            raise ProvenanceError(f"is about {document.subject}, another paper than {self.subject}")
        found = pool_of(document)
        self.subject = document.subject
        self.pool.join(found)

    def state(self) -> dict[str, Any]:
        """Return the state of all that was added.

        Raises:
            ProvenanceError: Nothing was added.
        """
        if self.subject is None:
            raise ProvenanceError("there is nothing to merge")
        return state_of(self.subject, self.pool)


def merge(documents: Iterable[Any], store: TrustStore | None = None) -> dict[str, Any]:
    """Merge bundles, states and events about one paper into a state.

    Raises:
        ProvenanceError: A document cannot be read, or is about another paper.
    """
    merger = Merger(store)
    for content in documents:
        merger.add(content)
    return merger.state()


def pool_of(document: Document) -> Pool:
    """Sort a document's events into valid and invalid ones.

    Raises:
        ProvenanceError: The document holds no lists of events.
    """
    content = document.content
    if document.kind == "bundle" and type(content.get("events")) is not list:
        raise ProvenanceError(f"the bundle's `events` is {brief(content.get('events'))}, not a list")
    if document.kind == "state" and type(content.get("current")) is not dict:
        raise ProvenanceError(f"the state's `current` is {brief(content.get('current'))}, not an object")
    pool = Pool()
    for checked in document.events:
        if not checked.reasons:
            pool.valid[checked.event["event_id"]] = checked.event
            if not checked.signed:
                pool.unsigned.add(checked.event["event_id"])
        else:
            event = checked.event
            pool.set_aside(SetAside(part_sha256_hex(event), claimed_id(event), checked.reasons))
    if document.kind == "state":
        for entry in _carried(content):
            pool.set_aside(entry)
    return pool


def state_of(subject: str, pool: Pool) -> dict[str, Any]:
    """Return the state of a pool of events about ``subject``."""
    events = sorted(pool.valid.values(), key=order_of)
    records = [event for event in events if event["event_type"] == RECORD]
    invalid = [
        {"event_id": found.event_id, "event_sha256": found.event_sha256, "reasons": sorted(found.reasons)}
        for found in pool.remaining()
    ]
    equivocations = find_equivocations(events)
    current: dict[str, Any] = {"canonical_record": None, "source_aliases": [], RECORD: None}
    if records:
        record = records[0]["payload"]["canonical_record"]
        current["canonical_record"] = record
        current["source_aliases"] = source_aliases(record, subject, records[0]["created_at"])
        current[RECORD] = entry_of(records[0])
    for event_type, name in LISTS.items():
        current[name] = [entry_of(event) for event in events if event["event_type"] == event_type]
    if len(records) > 1:
        current[OTHER_RECORDS] = [entry_of(event) for event in records[1:]]
    state: dict[str, Any] = {
        "state_type": STATE_TYPE,
        "state_version": STATE_VERSION,
        "pith_number": subject,
        "merge_version": MERGE_VERSION,
        "event_count": len(events) + len(invalid),
        "valid_event_count": len(events),
        "invalid_event_count": len(invalid),
        "equivocation_count": len(equivocations),
        "current": current,
        "equivocations": equivocations,
        "invalid_events": invalid,
        "applied_event_ids": [event["event_id"] for event in events],
    }
    state["state_sha256"] = part_sha256_hex(state)
    return state


def find_equivocations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the places that one key claims with several events, in order (see the top of this file)."""
    follows = _followed_events(events)
    claims: dict[tuple[str, str, str, str], list[str]] = {}
    superseded = {(_key_of(event), link) for event in events for link in event["supersedes"]}
    for event in events:
        if (_key_of(event), event["event_id"]) not in superseded:
            claims.setdefault((*_slot_of(event), follows[event["event_id"]] or ""), []).append(event["event_id"])
    return [
        {
            "public_key_fingerprint": key,
            "event_type": event_type,
            "target": target,
            "prev_event": prev_event or None,
            "event_ids": sorted(ids),
        }
        for (key, event_type, target, prev_event), ids in sorted(claims.items())
        if len(ids) > 1
    ]


def slot_of(event_type: str, target: str) -> tuple[str, str]:
    """Return what events of one signer compete for: the type, and the target as a reader sees it."""
    return event_type, plain_text(target)


def _key_of(event: dict[str, Any]) -> str:
    return event["signer"]["public_key_fingerprint"]


def _slot_of(event: dict[str, Any]) -> tuple[str, str, str]:
    return _key_of(event), *slot_of(event["event_type"], event["target"])


def _followed_events(events: list[dict[str, Any]]) -> dict[str, str | None]:
    """Return for each event's id that of the nearest event before it, by ``prev_event``, in the same slot, or None.

    One walk over the forest that the links of each key make, without recursion; a chain may lead over other slots.
    """
    by_id = {event["event_id"]: event for event in events}
    after: dict[str | None, list[str]] = {}
    for event in events:
        before = by_id.get(event["prev_event"])
        leads = before is not None and _key_of(before) == _key_of(event)
        after.setdefault(event["prev_event"] if leads else None, []).append(event["event_id"])
    follows: dict[str, str | None] = dict.fromkeys(by_id)
    latest: dict[tuple[str, str, str], str | None] = {}
    walk = [(event_id, False) for event_id in after.get(None, ())]
    while walk:
        event_id, leaving = walk.pop()
        slot = _slot_of(by_id[event_id])
        if leaving:
            latest[slot] = follows[event_id]
            continue
        follows[event_id], latest[slot] = latest.get(slot), event_id
        walk.append((event_id, True))
        walk.extend((later, False) for later in after.get(event_id, ()))
    return follows


def _carried(state: dict[str, Any]) -> list[SetAside]:
    """Return the invalid events that a state lists.

    Raises:
        ProvenanceError: They are not listed as a merge lists them.
    """
    entries = typed(state, "invalid_events", list)
    if entries is None or len(entries) > MAX_EVENTS:
        raise ProvenanceError("the state's `invalid_events` is no list, or too long a one")
    found = []
    for number, entry in enumerate(entries):
        reasons = typed(entry, "reasons", list) or []
        if (
            type(entry) is not dict
            or entry.keys() != {"event_id", "event_sha256", "reasons"}
            or not is_digest(entry["event_sha256"])
            or not (entry["event_id"] is None or is_event_id(entry["event_id"]))
            or not reasons
            or not all(type(reason) is str for reason in reasons)
        ):
            raise ProvenanceError(f"the state's invalid_events[{number}] is not event_id, event_sha256 and reasons")
        found.append(SetAside(entry["event_sha256"], entry["event_id"], frozenset(reasons)))
    return found
