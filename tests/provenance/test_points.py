"""Points of Ed25519 that count for nothing, of small order or in a second spelling, by arithmetic on the curve."""

import base64
import functools
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gradfold.provenance import (
    ProvenanceError,
    PublicKey,
    TrustStore,
    canonical_bytes,
    merge,
    parse,
    sign_bundle,
    verify,
)
from gradfold.provenance.keys import read_keys
from gradfold.provenance.points import SMALL_ORDER_Y, point_trouble
from tests.provenance.makers import bundle_of, event, failed, record_event, resign, signer

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
BASE_Y = 4 * pow(5, -1, P) % P


def spelled(y, sign=0):
    return (y | sign << 255).to_bytes(32, "little")


SMALL = [
    spelled(y + more, sign) for y in sorted(SMALL_ORDER_Y) for more in (0, P) if y + more < 2**255 for sign in (0, 1)
]
SECOND = [spelled(y, sign) for y in range(P, 2**255) for sign in (0, 1)]


def x_of(y):
    """One x of a point, or None where no point has this y."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return x if (x * x - square) % P == 0 else None


def plus(one, other):
    (a, b), (c, d) = one, other
    both = D * a * b * c * d
    return (a * d + b * c) * pow(1 + both, -1, P) % P, (b * d + a * c) * pow(1 - both, -1, P) % P


def times(number, point):
    result = (0, 1)
    for bit in bin(number)[2:]:
        result = plus(result, result)
        result = plus(result, point) if bit == "1" else result
    return result


def test_the_table_is_the_whole_torsion_group():
    generator = None
    for y in range(2, 40):
        if (x := x_of(y)) is not None:
            point = times(L, (x, y))
            if times(4, point) != (0, 1):
                generator = point
                break
    group = {times(number, generator) for number in range(8)}
    assert len(group) == 8 and {y for _, y in group} == SMALL_ORDER_Y


def test_good_points_are_left_alone():
    point = (x_of(BASE_Y), BASE_Y)
    assert times(L, point) == (0, 1)
    for number in range(1, 40):
        x, y = times(number, point)
        assert point_trouble(spelled(y, x & 1)) is None
    for number in range(1, 60):
        assert PublicKey(signer("x", number).public.raw).trouble is None


@functools.cache
def forged(key, digest):
    """A signature that OpenSSL takes for this key and digest, made without a private key; None where none is found."""
    for point in SMALL:
        signature = point + bytes(32)
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, digest)
        except Exception:
            continue
        return signature
    return None


@pytest.mark.parametrize("key", SMALL, ids=lambda key: key.hex()[:8] + key.hex()[-2:])
def test_a_key_of_small_order_verifies_nothing(key):
    """It does for OpenSSL: about every second message can be signed by nobody."""
    digests = [hashlib.sha256(bytes([n])).digest() for n in range(20)]
    forgeries = [(digest, forged(key, digest)) for digest in digests if forged(key, digest)]
    assert len(forgeries) > 3
    assert not any(PublicKey(key, "k").verifies(signature, digest) for digest, signature in forgeries)


@pytest.mark.parametrize("key", SMALL + SECOND, ids=lambda key: key.hex()[:8] + key.hex()[-2:])
def test_it_is_refused_at_every_door(key, tmp_path):
    bad = PublicKey(key, "mallory")
    for add in (TrustStore().add, lambda key: TrustStore([key]), lambda key: TrustStore(registries=[key])):
        with pytest.raises(ProvenanceError, match="small order|one spelling"):
            add(bad)
    with pytest.raises(ProvenanceError, match="key 1: public_key_point the key (has small order|is not in its one)"):
        read_keys(canonical_bytes(bad.as_entry()))
    pem = Ed25519PublicKey.from_public_bytes(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for data in (pem, canonical_bytes([bad.as_entry()]), canonical_bytes({"public_keys": [bad.as_entry()]})):
        path = tmp_path / "keys"
        path.write_bytes(data)
        store = TrustStore()
        with pytest.raises(ProvenanceError, match="keys: .*the key (has small order|is not in its one spelling)"):
            store.add_file(path)
        assert len(store.keys) == 1


@pytest.mark.parametrize("key", [SMALL[0], SMALL[-1], spelled(1), spelled(P + 1, 1)], ids=lambda key: key.hex()[:8])
def test_a_bundle_that_nobody_signed(key, trusting):
    """An event by a key of small order, its forged signature, and the key listed in the bundle."""
    mallory = PublicKey(key, "mallory", "mallory")
    ada = signer("ada", 1)
    told = {"signer_id": "mallory", "signer_type": "independent", "key_id": "mallory"}
    for n in range(40):
        made = resign(ada, {**event(ada, {"n": n}), "signer": {**told, "public_key_fingerprint": mallory.fingerprint}})
        signature = forged(key, bytes.fromhex(made["content_sha256"]))
        if signature is not None:
            break
    made["signature"] |= {
        "key_id": "mallory",
        "public_key_fingerprint": mallory.fingerprint,
        "signature_b64": base64.b64encode(signature).decode(),
    }
    bundle = bundle_of(ada, [record_event(ada), made])
    bundle["public_keys"].append(mallory.as_entry())
    bundle["bundle_signature"] = sign_bundle(bundle, ada)
    assert {"public_key_point", "key_point"} <= failed(verify(bundle, trusting))
    state = merge([bundle], trusting)
    assert [aside["reasons"] for aside in state["invalid_events"]] == [["key_point"]]
    assert "key_point" in failed(verify(made, trusting))


@pytest.mark.parametrize("point", SMALL + SECOND, ids=lambda point: point.hex()[:8] + point.hex()[-2:])
def test_a_signature_whose_r_is_of_small_order(point, ada, trusting):
    """With S = k a for R = 0 it is a sound one to OpenSSL: made by the key's owner, but the same for R's eightfold."""
    seed = hashlib.sha512(bytes([1]) * 32).digest()
    scalar = int.from_bytes(seed[:32], "little") & (2**254 - 8) | 2**254
    made = event(ada, {"n": 1})
    digest = bytes.fromhex(made["content_sha256"])
    k = int.from_bytes(hashlib.sha512(point + ada.public.raw + digest).digest(), "little")
    signature = point + (k * scalar % L).to_bytes(32, "little")
    if point == spelled(1):
        Ed25519PublicKey.from_public_bytes(ada.public.raw).verify(signature, digest)
    assert not ada.public.verifies(signature, digest)
    made["signature"]["signature_b64"] = base64.b64encode(signature).decode()
    assert failed(verify(made, trusting)) == {"signature"}


def test_a_registry_in_a_state_cannot_be_of_small_order(state):
    weak = PublicKey(spelled(1), "pith-v1-2026-05", "pith.science")
    text = canonical_bytes(state).replace(b"8d4b5ee74e4693bcd1df2446408b0d54", weak.fingerprint.encode())
    assert {"key_point", "receipt_key_point", "registry"} & failed(verify(parse(text)))
