"""Pith open-graph documents: read strictly, verify, merge, sign. Needs ``cryptography`` and nothing of gradfold."""

from .canonical import canonical_bytes, parse, sha256_hex
from .cite import citation_payload
from .errors import ChecksFailed, ProvenanceError
from .files import read_document, read_json, write_document
from .identity import is_number_of, pith_number, short_number, source_aliases
from .keys import PublicKey
from .merge import MERGE_VERSION, Merger, find_equivocations, merge
from .replicate import replication_payload
from .report import Check, Status, Verification
from .sign import (
    NeedsPassphrase,
    Signer,
    append,
    build_bundle,
    generate_key,
    load_signer,
    mirror_hint,
    new_signer,
    sign_bundle,
    sign_event,
    signer_for,
)
from .trust import PITH_REGISTRY, TrustStore
from .verify import verify
from .vocabulary import OUTCOMES, RELATIONS

__all__ = [
    "MERGE_VERSION",
    "OUTCOMES",
    "PITH_REGISTRY",
    "RELATIONS",
    "Check",
    "ChecksFailed",
    "Merger",
    "NeedsPassphrase",
    "ProvenanceError",
    "PublicKey",
    "Signer",
    "Status",
    "TrustStore",
    "Verification",
    "append",
    "build_bundle",
    "canonical_bytes",
    "citation_payload",
    "find_equivocations",
    "generate_key",
    "is_number_of",
    "load_signer",
    "merge",
    "mirror_hint",
    "new_signer",
    "parse",
    "pith_number",
    "read_document",
    "read_json",
    "replication_payload",
    "sha256_hex",
    "short_number",
    "sign_bundle",
    "sign_event",
    "signer_for",
    "source_aliases",
    "verify",
    "write_document",
]
