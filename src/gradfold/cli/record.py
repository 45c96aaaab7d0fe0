"""``gradfold record``: verify, show, merge and sign Pith open-graph documents."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Sequence
from typing import Any

from gradfold.provenance import (
    Merger,
    NeedsPassphrase,
    ProvenanceError,
    Signer,
    TrustStore,
    Verification,
    append,
    build_bundle,
    generate_key,
    load_signer,
    mirror_hint,
    new_signer,
    read_document,
    replication_payload,
    verify,
    write_document,
)
from gradfold.provenance.files import read_bytes

from .record_options import build_parser
from .record_show import card_of, print_card, print_report

VERIFIED, FAILED, UNREADABLE = 0, 1, 2
PASSPHRASE_BYTES = 1024


def run(arguments: Sequence[str]) -> int:
    """Run one subcommand.

    Returns:
        Exit status: 0 verified or done, 1 a check failed, 2 unreadable input.

    Raises:
        ProvenanceError: A document, key, file or option cannot be used.
    """
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return UNREADABLE
    try:
        options = parser.parse_args(list(arguments))
    except SystemExit:  # --help has been printed; errors are raised
        return VERIFIED
    return ACTIONS[options.action](options)


def run_verify(options: argparse.Namespace) -> int:
    """Verify each file, even if others fail."""
    store = _store(options)
    codes: list[int] = []
    found: list[dict[str, Any]] = []
    for path in options.files:
        try:
            report = _naming(path, lambda path=path: verify(read_document(path), store))
        except ProvenanceError as error:
            codes.append(UNREADABLE)
            found.append({"file": path, "verified": False, "error": str(error)})
            if not options.json:
                print(f"gradfold: {_one_line(error)}", file=sys.stderr)
            continue
        codes.append(_exit_code(report))
        found.append({"file": path, **report.as_dict()})
        if not options.json:
            print_report(path, report, every=options.all)
    if options.json:
        print(json.dumps({"verified": max(codes) == VERIFIED, "files": found}, indent=1))
    return max(codes)


def run_show(options: argparse.Namespace) -> int:
    """Print a summary of one paper."""
    document = read_document(options.file)
    report = _naming(options.file, lambda: verify(document, _store(options)))
    card = {"file": options.file, **card_of(document, report)}
    if options.json:
        print(json.dumps(card, indent=1))
    else:
        print_card(card)
    return _exit_code(report)


def run_merge(options: argparse.Namespace) -> int:
    """Merge all files into one state. Invalid events and equivocations are listed in it, and are not errors."""
    merger = Merger(_store(options))
    for path in options.files:
        _naming(path, lambda path=path: merger.add(read_document(path)))
    state = merger.state()
    write_document(options.out, state)
    if options.json:
        names = ("pith_number", "state_sha256", "valid_event_count", "invalid_events", "equivocations")
        facts = {name: state[name] for name in names}
        print(json.dumps({"out": options.out, **facts, "unsigned_event_count": len(merger.pool.unsigned)}, indent=1))
        return VERIFIED
    print(f"{options.out}: {state['valid_event_count']} events, state_sha256 {state['state_sha256']}")
    if merger.pool.unsigned:
        print(f"  {len(merger.pool.unsigned)} of them come from states alone, so without their signatures")
    for entry in state["invalid_events"]:
        print(
            f"  set aside: {entry['event_id'] or entry['event_sha256']} fails {_one_line(', '.join(entry['reasons']))}"
        )
    for slot in state["equivocations"]:
        print(f"  equivocation by key {slot['public_key_fingerprint']}: {', '.join(slot['event_ids'])}")
    return VERIFIED


def run_keygen(options: argparse.Namespace) -> int:
    """Generate a key pair."""
    passphrase = None
    if options.passphrase_file:
        passphrase = _passphrase_in(options.passphrase_file)
    elif options.passphrase:
        passphrase = getpass.getpass("passphrase: ").encode("utf-8")
        if not passphrase or getpass.getpass("once more: ").encode("utf-8") != passphrase:
            raise ProvenanceError("the passphrases are empty or differ; no key was made")
    signer = new_signer(options.signer_id, options.key_id)
    generate_key(options.out, signer, passphrase)
    if options.json:
        print(
            json.dumps({"private_key": options.out, "public_key": f"{options.out}.pub", **signer.describe()}, indent=1)
        )
        return VERIFIED
    print(f"{options.out}: private key, keep it to yourself")
    print(f"{options.out}.pub: public key {signer.key_id}, fingerprint {signer.public.fingerprint}")
    print(f"others verify what you sign with: gradfold record verify --trust-key {options.out}.pub FILE")
    return VERIFIED


def run_sign(options: argparse.Namespace) -> int:
    """Append an event to a paper's bundle, or sign the same events anew."""
    paper, signer, store = read_document(options.file), _signer(options), _store(options)
    mirrors = [mirror_hint(url) for url in options.mirror]
    given = [options.type, options.target, options.payload]
    if all(given):
        bundle = _naming(
            options.file,
            lambda: append(
                paper,
                signer,
                options.type,
                options.target,
                read_document(options.payload),
                supersedes=options.supersedes,
                mirror_hints=mirrors,
                store=store,
            ),
        )
    elif any(given) or options.supersedes:
        raise ProvenanceError("an event takes --type, --target and --payload; without any, the bundle alone is signed")
    else:
        bundle = _naming(options.file, lambda: build_bundle(paper, signer, mirror_hints=mirrors, store=store))
    return _write(bundle, signer, options)


def run_replicate(options: argparse.Namespace) -> int:
    """Append a replication record made from a benchmark's result to a paper's bundle."""
    paper, signer, store = read_document(options.paper), _signer(options), _store(options)
    target, payload = replication_payload(
        paper,
        options.result,
        claim=options.claim,
        command=options.command,
        revision=options.revision,
        artifacts=options.artifact,
    )
    mirrors = [mirror_hint(url) for url in options.mirror]
    bundle = _naming(
        options.paper,
        lambda: append(
            paper,
            signer,
            "replication_record",
            target,
            payload,
            supersedes=options.supersedes,
            mirror_hints=mirrors,
            store=store,
        ),
    )
    return _write(bundle, signer, options)


ACTIONS = {
    "verify": run_verify,
    "show": run_show,
    "merge": run_merge,
    "keygen": run_keygen,
    "sign": run_sign,
    "replicate": run_replicate,
}


def _write(bundle: dict[str, Any], signer: Signer, options: argparse.Namespace) -> int:
    write_document(options.out, bundle)
    event_id = bundle["events"][-1]["event_id"] if bundle["events"] else None
    digest = bundle["bundle_signature"]["bundle_sha256"]
    if options.json:
        facts = {"out": options.out, "pith_number": bundle["pith_number"], "bundle_sha256": digest}
        print(json.dumps({**facts, "last_event_id": event_id, "signer": signer.describe()}, indent=1))
        return VERIFIED
    print(f"{options.out}: {len(bundle['events'])} events, the last {event_id}")
    print(f"signed as {signer.signer_id} with the key {signer.key_id}; bundle_sha256 {digest}")
    print(f"verify it with: gradfold record verify --trust-key {options.key}.pub {options.out}")
    return VERIFIED


def _store(options: argparse.Namespace) -> TrustStore:
    store = TrustStore()
    for path in options.trust_key:
        store.add_file(path)
    return store


def _signer(options: argparse.Namespace) -> Signer:
    """Load the signer of --key; asks for the passphrase on a terminal."""
    passphrase = _passphrase_in(options.passphrase_file) if options.passphrase_file else None
    try:
        return load_signer(options.key, passphrase, options.signer_id, options.key_id)
    except NeedsPassphrase:
        if not sys.stdin.isatty():
            raise
    passphrase = getpass.getpass(f"passphrase of {options.key}: ").encode("utf-8")
    return load_signer(options.key, passphrase, options.signer_id, options.key_id)


def _passphrase_in(path: str) -> bytes:
    passphrase = read_bytes(path, PASSPHRASE_BYTES).rstrip(b"\r\n")
    if not passphrase:
        raise ProvenanceError(f"{path}: holds no passphrase")
    return passphrase


def _naming(path: str, action: Any) -> Any:
    """Run ``action``; add the file's name to its error, if it is missing there.

    Raises:
        ProvenanceError: The action failed.
    """
    try:
        return action()
    except ProvenanceError as error:
        if not str(error).startswith(f"{path}: ") and not isinstance(error, NeedsPassphrase):
            error.args = (f"{path}: {error}",)
        raise


def _exit_code(report: Verification) -> int:
    return VERIFIED if report.verified else FAILED


def _one_line(error: object) -> str:
    """Remove line breaks and control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))
