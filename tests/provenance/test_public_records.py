"""Records and receipts from the registry's public pages: numbers, aliases and signatures come out as published."""

import base64

import pytest

from gradfold.provenance import PITH_REGISTRY, TrustStore, pith_number, sha256_hex, short_number, source_aliases
from gradfold.provenance.identity import identity_of, split_number
from gradfold.provenance.report import Checker
from gradfold.provenance.signatures import RECEIPT_MESSAGE, check_signature
from gradfold.provenance.trust import Keyring
from tests.provenance.makers import read_seed

PUBLIC = read_seed("public_records")
RECORDS, RECEIPTS = PUBLIC["records"], PUBLIC["receipts"]


@pytest.mark.parametrize("page", RECORDS, ids=lambda page: page["canonical_record"]["source"]["id"])
def test_the_number_is_that_of_the_record(page):
    record, number = page["canonical_record"], page["pith_number"]
    assert sha256_hex(record) == page["canonical_sha256"]
    assert pith_number(record, int(record["metadata"]["submitted_at"][:4])) == number
    reordered = {key: record[key] for key in reversed(list(record))}
    assert sha256_hex(reordered) == page["canonical_sha256"]
    for part in ("source", "metadata"):
        for key, value in record[part].items():
            other = {**record, part: {**record[part], key: [value]}}
            assert identity_of(sha256_hex(other)) != split_number(number)[1]


@pytest.mark.parametrize(
    ("identifier", "version"),
    [
        pytest.param("hep-lat/0305021", 1, id="before 2007"),
        pytest.param("math.GT/0309136", 12, id="before 2007, with a subject class"),
        pytest.param("0904.3154", 3, id="four digits"),
        pytest.param("1903.00297", 1, id="five digits"),
    ],
)
def test_aliases_of_arxiv_papers(identifier, version):
    record = {"source": {"kind": "arxiv", "id": identifier, "version": version}}
    number = "pith:2003:OMJFN3CZBZK4KRI4XCDIFRLNQH"
    assert {alias["alias_kind"]: alias["alias_value"] for alias in source_aliases(record, number, "")} == {
        "arxiv": identifier,
        "arxiv_version": f"{identifier}v{version}",
        "doi": f"10.48550/arxiv.{identifier}",
        "pith_short_8": "OMJFN3CZ",
        "pith_short_12": "OMJFN3CZBZK4",
        "pith_short_16": "OMJFN3CZBZK4KRI4",
    }


@pytest.mark.parametrize("page", RECEIPTS, ids=lambda page: short_number(page["pith_number"]))
def test_a_receipt_of_the_registry(page):
    digest, signature = page["canonical_sha256"], base64.b64decode(page["signature_b64"])
    assert identity_of(digest) == split_number(page["pith_number"])[1]
    assert PITH_REGISTRY.verifies(signature, bytes.fromhex(digest)) is page["verifies"]
    at = Checker("receipt")
    block = {
        "signature_status": "signed_v1",
        "algorithm": "ed25519",
        "key_id": PITH_REGISTRY.key_id,
        "public_key_fingerprint": PITH_REGISTRY.fingerprint,
        "signature_b64": page["signature_b64"],
        "signed_message": RECEIPT_MESSAGE,
        "signed_at": "2026-05-18T00:00:00Z",
    }
    check_signature(block, digest, RECEIPT_MESSAGE, Keyring(TrustStore()), at, "receipt_")
    failed = [(check.name, check.detail) for check in at.checks if check.status == "fail"]
    said = [("receipt_signature", "signature_b64 is not base64: it has 89 characters, a signature's 64 bytes have 88")]
    assert failed == ([] if page["verifies"] else said)


def test_a_receipt_is_of_one_digest():
    good = [page for page in RECEIPTS if page["verifies"]]
    for one in good:
        for other in good:
            same = PITH_REGISTRY.verifies(
                base64.b64decode(one["signature_b64"]), bytes.fromhex(other["canonical_sha256"])
            )
            assert same is (one is other)


def test_the_receipt_that_its_page_spells_wrong():
    """One letter too many: without it, it is the registry's."""
    (page,) = [page for page in RECEIPTS if not page["verifies"]]
    text = page["signature_b64"].rstrip("=")
    assert len(text) == 87
    mended = base64.b64decode(text[:42] + text[43:] + "==")
    assert PITH_REGISTRY.verifies(mended, bytes.fromhex(page["canonical_sha256"]))
