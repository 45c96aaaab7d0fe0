"""Public Ed25519 keys: in documents, in files, and verification of signatures."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from .canonical import parse
from .errors import ProvenanceError
from .points import point_trouble
from .report import Checker, typed


@dataclass(frozen=True)
class PublicKey:
    """A public key.

    Attributes:
        raw: The 32 bytes of the key.
        key_id: Name of the key; None for a key from a bare PEM file.
        signer_id: Name of its owner; None if unknown.
    """

    raw: bytes
    key_id: str | None = None
    signer_id: str | None = None

    @property
    def fingerprint(self) -> str:
        """First 32 hex digits of the SHA-256 of the raw key."""
        return hashlib.sha256(self.raw).hexdigest()[:32]

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Return whether the signature of the message is valid, by a key and with a point R that may be used."""
        if self.trouble is not None or point_trouble(signature[:32]) is not None:
            return False
        return _verifies(self.raw, signature, message)

    @property
    def trouble(self) -> str | None:
        """Why nothing may be verified with this key; None if it may be used."""
        return point_trouble(self.raw)

    def as_entry(self) -> dict[str, Any]:
        """Return the key as bundles list it under ``public_keys``."""
        digest = hashlib.sha256(self.raw).digest()
        entry = {
            "key_id": self.key_id or default_key_id(self),
            "algorithm": "ed25519",
            "format": "raw",
            "public_key_b64": base64.b64encode(self.raw).decode("ascii"),
            "public_key_hex": self.raw.hex(),
            "fingerprint_sha256_b32_first128bits": base64.b32encode(digest).decode("ascii")[:26],
            "fingerprint_sha256_hex": self.fingerprint,
        }
        if self.signer_id is not None:
            entry["signer_id"] = self.signer_id
        return entry


@functools.lru_cache(2**15)  # merged documents often hold the same events
def _verifies(raw: bytes, signature: bytes, message: bytes) -> bool:
    try:
        _loaded(raw).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@functools.lru_cache(256)
def _loaded(raw: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(raw)


def default_key_id(key: PublicKey) -> str:
    """Return a name for a key without one."""
    return f"ed25519-{key.fingerprint[:8]}"


def check_entry(entry: Any, at: Checker) -> PublicKey | None:
    """Check every form of the key in an entry of ``public_keys``; return the key if the forms agree."""
    if not at.test("structure", type(entry) is dict, "is not an object"):
        return None
    key_id = typed(entry, "key_id", str)
    sound = at.test("key_id", bool(key_id), "has no key_id")
    sound &= at.same("algorithm", entry.get("algorithm"), "ed25519")
    sound &= at.same("format", entry.get("format"), "raw")
    raw = decode_base64(entry.get("public_key_b64"), 32)
    if not at.test("public_key_b64", raw is not None, "is not the base64 of 32 bytes") or raw is None:
        return None
    key = PublicKey(raw, key_id, typed(entry, "signer_id", str))
    sound &= at.test("public_key_point", key.trouble is None, f"the key {key.trouble}")
    expected = key.as_entry()
    for name in ("public_key_hex", "fingerprint_sha256_hex", "fingerprint_sha256_b32_first128bits"):
        sound &= at.same(name, entry.get(name), expected[name])
    return key if sound else None


def read_keys(data: bytes) -> list[PublicKey]:
    """Read the keys in a file: a PEM key, an entry as in ``public_keys``, or a list of those.

    A private key without a passphrase stands for its public half.

    Raises:
        ProvenanceError: The file holds no usable key.
    """
    if data.lstrip()[:11] == b"-----BEGIN ":
        key = PublicKey(_read_pem(data))
        if key.trouble is not None:
            raise ProvenanceError(f"the key {key.trouble}; make another with `gradfold record keygen`")
        return [key]
    value = parse(data)
    if type(value) is dict and type(value.get("public_keys")) is list and "bundle_type" not in value:
        value = value["public_keys"]
    if type(value) is dict and "bundle_type" in value:
        raise ProvenanceError("is a bundle, and the keys in a bundle are only claims; name the signer's key file")
    entries = value if type(value) is list else [value]
    keys = []
    for number, entry in enumerate(entries, 1):
        at = Checker("")
        key = check_entry(entry, at)
        if key is None:
            failed = next(check for check in at.checks if check.status == "fail")
            raise ProvenanceError(f"key {number}: {failed.name} {failed.detail}")
        keys.append(key)
    if not keys:
        raise ProvenanceError("holds no key")
    return keys


def decode_base64(text: Any, size: int) -> bytes | None:
    """Decode base64 in its one canonical spelling; None otherwise, or if the result is not ``size`` bytes."""
    if type(text) is not str or len(text) > 2 * size:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    # Decoding drops the bits that pad the last letter, so compare spellings: only the canonical one is accepted.
    return data if len(data) == size and base64.b64encode(data).decode("ascii") == text else None


def raw_public(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """Return the 32 bytes of a public key, or of the public half of a private key."""
    return (key.public_key() if isinstance(key, Ed25519PrivateKey) else key).public_bytes_raw()


def _read_pem(data: bytes) -> bytes:
    try:
        if b"PRIVATE KEY" in data:
            key: Any = load_pem_private_key(data, password=None)
        else:
            key = load_pem_public_key(data)
    except TypeError:
        raise ProvenanceError("is a private key with a passphrase; name the public key's file") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ProvenanceError("is not a PEM key that can be read") from None
    if not isinstance(key, Ed25519PrivateKey | Ed25519PublicKey):
        raise ProvenanceError("is not an Ed25519 key")
    return raw_public(key)
