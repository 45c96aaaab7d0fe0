"""Citations: a signed statement that one work stands in some relation to the paper a bundle is about."""

from __future__ import annotations

from typing import Any

from .errors import ProvenanceError
from .identity import split_number
from .plain_text import plain_text
from .vocabulary import RELATIONS, known_word

CITATION_VERSION = "1.0"


def citation_payload(
    paper: dict[str, Any], citing: str, relation: str, *, claim: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Make target and payload of a ``citation_signature``: the work ``citing`` has this relation to ``paper``.

    Args:
        paper: Bundle or state of the paper that is cited.
        citing: The work that cites it: a pith number, an arXiv id, a DOI or an address.
        relation: One of ``RELATIONS``.
        claim: What exactly is supported, refuted, used ..., in a sentence.

    Raises:
        ProvenanceError: An argument cannot be used.
    """
    citing = plain_text(citing)
    if not citing or len(citing) > 500:
        raise ProvenanceError("--citing takes the citing work's pith number, arXiv id, DOI or address")
    number = paper.get("pith_number")
    if citing == number:
        raise ProvenanceError(f"--citing {citing}: is the cited paper itself")
    if citing.startswith("pith:") and split_number(citing) is None:
        raise ProvenanceError(f"--citing {citing[:60]!r}: is no pith number (pith:YEAR: and 26 letters)")
    citation = {
        "citation_version": CITATION_VERSION,
        "citing": citing,
        "cited_pith_number": number,
        "relation": known_word("relation", relation, RELATIONS),
        "claim": claim,
    }
    return f"citation:{citing}", {"citation": citation}
