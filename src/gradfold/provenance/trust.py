"""Trusted keys: built-in ones and those the user names. A key inside a document is only a claim."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import ProvenanceError
from .files import read_bytes
from .keys import PublicKey, read_keys
from .plain_text import plain_text
from .points import SMALL_ORDER_FINGERPRINTS
from .report import brief

PITH_REGISTRY = PublicKey(
    bytes.fromhex("b2d552b68890857171a78b36a5dccf368a953413288c353f7c9d9d6f94b709b3"),
    key_id="pith-v1-2026-05",
    signer_id="pith.science",
)
"""The registry's published key (https://pith.science/pith-signing-key.json), fingerprint 8d4b5ee7...8b0d54."""

REGISTRY_TYPE = "pith_registry"
"""The `signer_type` of a registry."""

KNOWN_SIGNATURES = {
    "953c1334c881b59c9946750fb5ed160a5babeb2c1de42be54538ba0f8fed4213": (
        "e369997a6bf66c50145302c888e5eba4434d8b3c541a859aaa7ef484ab8e74f2"
    ),
}
"""SHA-256 of a bundle -> SHA-256 of its whole ``bundle_signature``, for the bundles this project builds on.

No digest and no signature covers the ``signed_at`` of a bundle signature, so a change of it is found only by comparison
with the original. For other bundles it is reported as not checked.
"""

KEY_FILE_BYTES = 2**20


@dataclass(frozen=True)
class FoundKey:
    """A key for a signature, and whether it is trusted or listed."""

    key: PublicKey
    trusted: bool
    listed: bool
    """Whether the document lists the key; the registry's key counts as listed everywhere."""
    clash: str = ""
    """How the names contradict those of trusted keys; empty if they do not."""


@dataclass(frozen=True)
class MissingKey:
    """Why there is no key; ``name`` is the check that fails."""

    name: str
    reason: str


class TrustStore:
    """Keys that the user trusts; by default only the registry's.

    A key is trusted for what it signs. A record (``record_created``) counts only from a registry: the built-in one, or
    a key that was trusted as one. Names are compared as ``plain_text``.
    """

    def __init__(self, keys: Iterable[PublicKey] = (PITH_REGISTRY,), registries: Iterable[PublicKey] = ()):
        self._by_fingerprint: dict[str, PublicKey] = {}
        self._by_id: dict[str, PublicKey] = {}
        self._by_signer: dict[str, set[str]] = {}
        self._registries = {PITH_REGISTRY.fingerprint}
        for key in keys:
            self.add(key)
        for key in registries:
            self.add(key, registry=True)

    def add(self, key: PublicKey, registry: bool = False) -> None:
        """Trust a key.

        Args:
            key: The key.
            registry: Also let it create records.

        Raises:
            ProvenanceError: Its id is that of another trusted key, or it is no key to trust.
        """
        if key.trouble is not None:
            raise ProvenanceError(f"the key {key.key_id or key.fingerprint} {key.trouble}; never trust it")
        known = self._by_fingerprint.get(key.fingerprint)
        if known is not None and known.key_id is not None:
            if key.key_id not in (None, known.key_id):
                raise ProvenanceError(f"the key {key.fingerprint} is trusted as {known.key_id}, not as {key.key_id}")
        else:
            if key.key_id is not None:
                other = self._by_id.setdefault(plain_text(key.key_id), key)
                if other.raw != key.raw:
                    raise ProvenanceError(f"the key id {key.key_id} is that of another trusted key; rename yours")
            self._by_fingerprint[key.fingerprint] = key
            if key.signer_id is not None:
                self._by_signer.setdefault(plain_text(key.signer_id), set()).add(key.fingerprint)
        if registry:
            self._registries.add(key.fingerprint)

    def add_file(self, path: str | os.PathLike[str], registry: bool = False) -> None:
        """Trust the keys in a file, which nobody else may write to.

        Args:
            path: The file.
            registry: Trust them as registries.

        Raises:
            ProvenanceError: Names the file.
        """
        data = read_bytes(path, KEY_FILE_BYTES, own=True)
        try:
            for key in read_keys(data):
                self.add(key, registry)
        except ProvenanceError as error:
            raise ProvenanceError(f"{path}: {error}") from None

    def with_key(self, key: PublicKey) -> TrustStore:
        """Return a copy that trusts one more key.

        Raises:
            ProvenanceError: As ``add``.
        """
        keys = self.keys
        widened = TrustStore(keys, [own for own in keys if self.is_registry(own.fingerprint)])
        widened.add(key)
        return widened

    @property
    def keys(self) -> list[PublicKey]:
        """The trusted keys."""
        return list(self._by_fingerprint.values())

    def find(self, fingerprint: str) -> PublicKey | None:
        """Return the trusted key with this fingerprint, or None."""
        return self._by_fingerprint.get(fingerprint)

    def is_registry(self, fingerprint: str) -> bool:
        """Return whether records of this key count; those of the built-in registry do for everyone."""
        return fingerprint in self._registries

    def owner_of(self, key_id: str) -> PublicKey | None:
        """Return the trusted key with this id, or None."""
        return self._by_id.get(plain_text(key_id))

    def impostor(self, signer_id: str, fingerprint: str) -> bool:
        """Return whether a signer's name belongs to another trusted key, or this trusted key to another name."""
        owners = self._by_signer.get(plain_text(signer_id))
        if owners is not None:
            return fingerprint not in owners
        key = self._by_fingerprint.get(fingerprint)
        return key is not None and key.signer_id is not None


RESERVED = TrustStore()
"""The registry's names belong to its key in everyone's eyes, whatever they trust."""


class Keyring:
    """The keys for one document's signatures: those it lists itself, and the trusted ones."""

    def __init__(self, store: TrustStore, claims: Iterable[PublicKey] = ()):
        self.store = store
        self._claims: dict[str, list[PublicKey]] = {}
        for key in (PITH_REGISTRY, *claims):
            self._claims.setdefault(key.fingerprint, []).append(key)

    def find(self, key_id: str, fingerprint: str) -> FoundKey | MissingKey:
        """Return the key that a signature names by id and fingerprint, or why there is none."""
        if fingerprint in SMALL_ORDER_FINGERPRINTS:
            return MissingKey("key_point", "the key has small order: anybody can sign with it")
        if (owner := RESERVED.owner_of(key_id)) is not None and owner.fingerprint != fingerprint:
            return MissingKey("key_id", f"{brief(key_id)} is the id of the registry's key, but this is another key")
        if (owner := RESERVED.find(fingerprint)) is not None and owner.key_id != key_id:
            return MissingKey("key_id", f"is {brief(key_id)}, but the registry's key goes by {brief(owner.key_id)}")
        listed = self._claims.get(fingerprint, [])
        ids = [key.key_id for key in listed]
        if ids and None not in ids and key_id not in ids:
            return MissingKey("key_id", f"is {brief(key_id)}, but that key goes by {brief(ids[0])}")
        trusted = self.store.find(fingerprint)
        clash = ""
        if (owner := self.store.owner_of(key_id)) is not None and owner.fingerprint != fingerprint:
            clash = f"{brief(key_id)} is the id of a trusted key, but this is another key"
        elif trusted is not None and trusted.key_id not in (None, key_id):
            clash = f"is {brief(key_id)}, but that key is trusted as {brief(trusted.key_id)}"
        if listed or trusted is not None:
            return FoundKey(trusted or listed[0], trusted is not None, bool(listed), clash)
        return MissingKey("key", f"no key with fingerprint {brief(fingerprint)}; name the file of one that you trust")
