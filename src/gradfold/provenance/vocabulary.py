"""The registry's words: how one work cites another, and what came of repeating it."""

from __future__ import annotations

from collections.abc import Collection

from .checks import Document
from .errors import ProvenanceError
from .report import Check, Checker, typed

CITATION, REPLICATION = "citation_signature", "replication_record"
RELATIONS = ("supports", "refutes", "extends", "uses_method", "depends_on", "replaces", "compares", "cites")
"""What a citing work does with the cited one."""
OUTCOMES = ("replication", "falsification", "formal_bridge")
"""What a replication record reports: the claim held, it did not, or it was carried over to a proof assistant."""

WORDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    CITATION: ("citation", "relation", RELATIONS),
    REPLICATION: ("replication_record", "outcome", OUTCOMES),
}
"""Event type -> (object in its payload, field there, the words it may hold)."""


def known_word(name: str, word: str, known: Collection[str]) -> str:
    """Return a word in the registry's spelling: ``formal-bridge`` and ``Formal bridge`` are ``formal_bridge``.

    Raises:
        ProvenanceError: It is none of the known ones.
    """
    spelled = "_".join(word.strip().lower().replace("-", " ").replace("_", " ").split())
    if spelled not in known:
        raise ProvenanceError(f"{name} = {word[:60]!r}: takes {', '.join(known)}")
    return spelled


def check_words(document: Document, checks: list[Check]) -> None:
    """Check the words of citations and replications, where their payload has the field. Other payloads are free."""
    for found in document.events:
        if type(found.event) is not dict or type(found.event.get("event_type")) is not str:
            continue
        holder, name, known = WORDS.get(found.event["event_type"], ("", "", ()))
        inner = typed(typed(found.event, "payload", dict), holder, dict) or {}
        if name in inner:
            at = Checker(found.where, checks)
            at.test(name, inner[name] in known, "{} is not one of the registry's words", inner[name])
