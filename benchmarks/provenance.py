"""Time to verify and to merge 10,000 signed events on one core.

Writes a bundle with chains of events by a few signers to a file. Times, in one process: reading it, verifying it
(every digest and signature, and the state recomputed), and merging two bundles with half of the events each. Merging
checks all events again; their signatures are cached by then.

    python -m benchmarks.provenance
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gradfold.provenance import (
    Signer,
    TrustStore,
    merge,
    pith_number,
    read_document,
    sha256_hex,
    short_number,
    sign_bundle,
    sign_event,
    signer_for,
    source_aliases,
    verify,
    write_document,
)

from .common import print_table, write_result

RECORD = {
    "metadata": {"submitted_at": "2026-01-01T00:00:00Z", "title_canon_sha256": "0" * 64},
    "schema_version": "1.0",
    "source": {"id": "2601.00001", "kind": "arxiv", "version": 1},
}
TIME = "2026-07-01T00:00:00Z"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--signers", type=int, default=5)
    parser.add_argument("--payload-bytes", type=int, default=600)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/provenance.json)")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, whatever a library may start

    signers = [
        signer_for(Ed25519PrivateKey.from_private_bytes(bytes([n + 1]) * 32), f"s{n}") for n in range(args.signers)
    ]
    store = TrustStore([signer.public for signer in signers])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle.json"
        write_document(path, make_document(signers, args.events, args.payload_bytes))
        file_bytes = path.stat().st_size
        start = time.perf_counter()
        bundle = read_document(path)
        read_s = time.perf_counter() - start
    cpu_start, start = time.process_time(), time.perf_counter()
    report = verify(bundle, store)
    verify_s = time.perf_counter() - start
    halves = [{**bundle, "events": bundle["events"][n::2]} for n in (1, 0)]
    start = time.perf_counter()
    state = merge(halves)
    merge_s = time.perf_counter() - start
    cpu_s = time.process_time() - cpu_start
    if not report.verified or state != bundle["state"]:
        raise SystemExit(f"the bundle does not verify: {report.failures[:3]}")
    row = {
        "events": args.events,
        "payload_bytes": args.payload_bytes,
        "checks": len(report.checks),
        "file_bytes": file_bytes,
        "read_s": round(read_s, 3),
        "verify_s": round(verify_s, 3),
        "merge_s": round(merge_s, 3),
        "total_s": round(read_s + verify_s + merge_s, 3),
        "verify_and_merge_cpu_s": round(cpu_s, 3),
    }
    print_table(["", "s"], [[name, f"{row[name]:.2f}"] for name in row if name.endswith("_s")])
    print(f"\n{args.events} events, {row['checks']} checks, {file_bytes / 2**20:.1f} MiB")
    print(f"written to {write_result('provenance', [row], args.out)}")


def make_document(signers: list[Signer], events: int, payload_bytes: int) -> dict[str, Any]:
    """Return a signed bundle of ``events`` events in one chain per signer."""
    number = pith_number(RECORD, 2026)
    chain: dict[str, str] = {}
    made = []
    for n in range(events):
        signer = signers[n % len(signers)]
        payload = {"n": n, "note": "x" * payload_bytes}
        follows = chain.get(signer.key_id)
        made.append(sign_event(signer, number, "replication_record", "t", payload, prev_event=follows, created_at=TIME))
        chain[signer.key_id] = made[-1]["event_id"]
    bundle = {
        "bundle_type": "pith_open_graph_bundle",
        "bundle_version": "1.0",
        "pith_number": number,
        "short_pith_number": short_number(number),
        "canonical_record": RECORD,
        "canonical_sha256": sha256_hex(RECORD),
        "source": RECORD["source"],
        "source_aliases": source_aliases(RECORD, number, TIME),
        "events": made,
        "timestamp_proofs": [],
        "mirror_hints": [],
        "public_keys": [signer.public.as_entry() for signer in signers],
        "merge_version": "pith-open-graph-merge-v1",
        "built_at": made[-1]["signature"]["signed_at"],
    }
    bundle["state"] = merge([bundle])
    return {**bundle, "bundle_signature": sign_bundle(bundle, signers[0])}


if __name__ == "__main__":
    main()
