"""Documents made for a test: signers by number, events, bundles of any events, changes at any place."""

import copy
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gradfold.provenance import TrustStore, merge, parse, pith_number, sha256_hex, sign_bundle, sign_event, signer_for
from gradfold.provenance.identity import short_number, source_aliases
from gradfold.provenance.sign import seal

SEEDS = ("forge_bundle", "chunkft_state")
FOLDER = Path(__file__).parent / "seeds"
TIME = "2026-07-01T00:00:00Z"


def seed_bytes(name):
    return (FOLDER / f"{name}.json").read_bytes()


def read_seed(name):
    return parse(seed_bytes(name))


def signer(name, number):
    return signer_for(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32), name)


REGISTRIES = TrustStore(registries=[signer("ada", 1).public, signer("bob", 2).public])
"""Trusts ada and bob as registries, beside the built-in one: most documents here hold a record of theirs."""


def record(identifier="2601.00001"):
    """A canonical record of a paper that does not exist."""
    return {
        "metadata": {"submitted_at": "2026-01-01T00:00:00Z", "title_canon_sha256": "0" * 64},
        "schema_version": "1.0",
        "source": {"id": identifier, "kind": "arxiv", "version": 1},
    }


def record_event(by, canonical_record=None, created_at=TIME, **more):
    """A `record_created` with a receipt, as a registry would sign it."""
    canonical_record = canonical_record or record()
    digest = sha256_hex(canonical_record)
    receipt = {
        **by.sign(digest, "canonical_sha256_bytes", created_at),
        "kind": "pith_receipt",
        "canonical_sha256": digest,
        "first_computed_at": created_at,
    }
    source = canonical_record["source"]
    payload = {
        "canonical_record": canonical_record,
        "canonical_sha256": digest,
        "receipt": receipt,
        **{f"source_{key}": source[key] for key in ("kind", "id", "version")},
        **more,
    }
    return resign(
        by,
        {
            "event_type": "record_created",
            "subject_pith_number": pith_number(canonical_record, 2026),
            "target": "record",
            "payload": payload,
            "signer": by.describe(),
            "created_at": created_at,
            "supersedes": [],
            "prev_event": None,
            "schema_version": "1.0",
        },
    )


def event(by, payload, subject=None, event_type="replication_record", target="t", created_at=TIME, **links):
    subject = subject or pith_number(record(), 2026)
    return sign_event(by, subject, event_type, target, payload, created_at=created_at, **links)


def resign(by, content):
    """An event with its digest, id and signature made anew, whatever it says."""
    bare = {key: value for key, value in content.items() if key not in ("event_id", "content_sha256", "signature")}
    return seal(by, bare)


def bundle_of(by, events, canonical_record=None, keys=()):
    """A signed bundle of any events, good or bad."""
    canonical_record = canonical_record or record()
    number = pith_number(canonical_record, 2026)
    bundle = {
        "bundle_type": "pith_open_graph_bundle",
        "bundle_version": "1.0",
        "pith_number": number,
        "short_pith_number": short_number(number),
        "canonical_record": canonical_record,
        "canonical_sha256": sha256_hex(canonical_record),
        "source": canonical_record["source"],
        "source_aliases": source_aliases(canonical_record, number, TIME),
        "events": events,
        "timestamp_proofs": [],
        "mirror_hints": [],
        "public_keys": [key.public.as_entry() for key in (keys or [by])],
        "merge_version": "pith-open-graph-merge-v1",
        "built_at": TIME,
    }
    bundle["state"] = merge([bundle], REGISTRIES)
    return {**bundle, "bundle_signature": sign_bundle(bundle, by)}


def leaves(value, path=()):
    """The path of every value that holds no other, empty lists and objects among them."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def at(document, path):
    for key in path:
        document = document[key]
    return document


def changed(document, path, value):
    """A copy with another value at one place."""
    document = copy.deepcopy(document)
    if not path:
        return value
    at(document, path[:-1])[path[-1]] = value
    return document


def failed(report):
    """The names of the checks that failed."""
    return {check.name for check in report.failures}
