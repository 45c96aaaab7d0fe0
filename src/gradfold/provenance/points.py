"""Points of Ed25519 that must not stand for a key or in a signature.

With a public key of small order anybody can make signatures that verify, for any message (RFC 8032 leaves checking to
the verifier, and OpenSSL does not check). A signature whose point R has small order says nothing about its key. And a
point has one spelling: y below 2**255 - 19, little-endian, with the sign of x in the last bit.
"""

from __future__ import annotations

import hashlib

_P = 2**255 - 19
_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
SMALL_ORDER_Y = frozenset({0, 1, _P - 1, _ORDER_8, _P - _ORDER_8})
"""The y of the eight points P with 8 P = 0: orders 4, 1, 2, 8 and 8. Both signs of x belong to them."""


def point_trouble(encoded: bytes) -> str | None:
    """Say what is wrong with the 32 bytes of a point; None for a point that may be used (it need not be on the curve).

    Returns:
        "has small order ..." or "is not in its one spelling ...", to follow the name of the point.
    """
    y = int.from_bytes(encoded, "little") & (2**255 - 1)
    if y % _P in SMALL_ORDER_Y:
        return "has small order: anybody can sign with it"
    if y >= _P:
        return "is not in its one spelling, with y below 2**255 - 19"
    return None


def _small_order_fingerprints() -> frozenset[str]:
    spellings = (y + more for y in SMALL_ORDER_Y for more in (0, _P) if y + more < 2**255)
    raw = [(y | sign << 255).to_bytes(32, "little") for y in spellings for sign in (0, 1)]
    return frozenset(hashlib.sha256(key).hexdigest()[:32] for key in raw)


SMALL_ORDER_FINGERPRINTS = _small_order_fingerprints()
"""Fingerprints of all spellings of all keys of small order: a signature names its key by fingerprint only."""
