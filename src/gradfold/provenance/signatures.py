"""Checks of one signature: form, digest, key, validity and time."""

from __future__ import annotations

import base64
from typing import Any

from .identity import instant
from .keys import decode_base64
from .points import point_trouble
from .report import Checker, Status, brief, typed
from .trust import Keyring, MissingKey

RECEIPT_MESSAGE = "canonical_sha256_bytes"
EVENT_MESSAGE = "open_graph_event_sha256_bytes"
BUNDLE_MESSAGE = "bundle_sha256_bytes"
BUNDLE_TYPE, BUNDLE_VERSION = "pith_open_graph_bundle", "1.0"
SIGNED, ALGORITHM = "signed_v1", "ed25519"


def check_signature(
    block: dict[str, Any],
    digest: str,
    message: str,
    keys: Keyring,
    at: Checker,
    prefix: str = "",
    not_before: Any = None,
    brings_keys: bool = True,
) -> None:
    """Note every check of a signature.

    Args:
        block: The signature block.
        digest: The digest it should cover, 64 hex digits.
        message: The kind of digest that it must say it signs.
        keys: The keys to check it with.
        at: Where checks are noted.
        prefix: Prefix of the checks' names.
        not_before: A time it must not be earlier than.
        brings_keys: Whether its document should list its key; a state has no room for keys.
    """
    at.same(f"{prefix}signature_status", block.get("signature_status"), SIGNED)
    at.same(f"{prefix}algorithm", block.get("algorithm"), ALGORITHM)
    at.same(f"{prefix}signed_message", block.get("signed_message"), message)
    _check_time(block.get("signed_at"), not_before, at, f"{prefix}signed_at")
    key_id, fingerprint = typed(block, "key_id", str), typed(block, "public_key_fingerprint", str)
    signature = decode_base64(block.get("signature_b64"), 64)
    if key_id is None or fingerprint is None:
        at.note(f"{prefix}key", Status.FAIL, "the signature names no key_id and public_key_fingerprint")
        at.note(f"{prefix}signature", Status.NOT_CHECKED, "there is no key to check it with")
        return
    found = keys.find(key_id, fingerprint)
    if isinstance(found, MissingKey):
        at.note(f"{prefix}{found.name}", Status.FAIL, found.reason, intrinsic=found.name != "key" or brings_keys)
        at.note(f"{prefix}signature", Status.NOT_CHECKED, "there is no key to check it with")
        return
    if found.clash:
        at.note(f"{prefix}key_id", Status.FAIL, found.clash, intrinsic=False)
    at.test(f"{prefix}key", found.listed or not brings_keys, "is a trusted key, but the document does not list it")
    status, detail = Status.FAIL, "the signature is not valid for this digest and key"
    if signature is None:
        detail = _why_no_signature(block.get("signature_b64"))
    elif (trouble := found.key.trouble or point_trouble(signature[:32])) is not None:
        detail = f"{'the key' if found.key.trouble else 'its point R'} {trouble}"
    elif found.key.verifies(signature, bytes.fromhex(digest)):
        status, detail = Status.PASS, f"trusted key {brief(key_id)}"
        if not found.trusted:
            status = Status.UNTRUSTED
            detail = f"valid signature, untrusted key {brief(key_id)}, fingerprint {fingerprint}"
    at.note(f"{prefix}signature", status, detail, intrinsic=found.listed)


def _why_no_signature(text: Any) -> str:
    """Say what is wrong with a ``signature_b64`` that cannot be read, such as one letter too many."""
    if type(text) is not str:
        return f"signature_b64 is {brief(text)}, not the base64 of 64 bytes"
    try:
        size = len(base64.b64decode(text, validate=True))
    except ValueError:
        return f"signature_b64 is not base64: it has {len(text)} characters, a signature's 64 bytes have 88"
    if size == 64:
        return "signature_b64 is not the base64 of 64 bytes in its one spelling"
    return f"signature_b64 is the base64 of {size} bytes, but a signature has 64"


def _check_time(time: Any, not_before: Any, at: Checker, name: str) -> None:
    signed, earliest = instant(time), instant(not_before)
    if signed is None:
        at.note(name, Status.FAIL, f"is {brief(time)}, not a time such as 2026-05-21T01:05:41Z")
    else:
        at.test(name, earliest is None or signed >= earliest, "is before {}, when it was made", not_before)
