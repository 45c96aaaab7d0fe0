"""``gradfold record``: verify, show, merge and sign Pith open-graph documents."""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import json
import sys
from collections.abc import Sequence
from typing import Any

from gradfold.provenance import (
    ChecksFailed,
    Merger,
    NeedsPassphrase,
    ProvenanceError,
    Signer,
    TrustStore,
    Verification,
    append,
    build_bundle,
    citation_payload,
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
from gradfold.provenance.replicate import AS_REPORTED, INDEPENDENT
from gradfold.provenance.verify import SIGNED_EVENT
from gradfold.provenance.vocabulary import CITATION, REPLICATION

from .record_options import build_parser
from .record_show import card_of, print_card, print_report
from .say import complain, one_line

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
            report = _naming(path, lambda path=path: _verify(read_document(path), store, options))
        except ProvenanceError as error:
            codes.append(UNREADABLE)
            found.append({"file": path, "verified": False, "error": str(error)})
            if not options.json:
                complain(error)
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
    report = _naming(options.file, lambda: _verify(document, _store(options), options))
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
    if options.require_signed_events and merger.pool.unsigned:
        raise ChecksFailed(
            f"{len(merger.pool.unsigned)} events come from states alone, without their signatures "
            f"({min(merger.pool.unsigned)}); merge the bundles that they are in, or leave out --require-signed-events"
        )
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
            f"  set aside: {entry['event_id'] or entry['event_sha256']} fails {one_line(', '.join(entry['reasons']))}"
        )
    for slot in state["equivocations"]:
        print(f"  equivocation by key {slot['public_key_fingerprint']}: {', '.join(slot['event_ids'])}")
    return VERIFIED


def run_keygen(options: argparse.Namespace) -> int:
    """Generate a key pair."""
    passphrase = None
    if options.passphrase_file is not None:
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
    given = [options.type, options.target, options.payload]
    if all(given):
        payload = read_document(options.payload)
        bundle = _append(options.file, paper, signer, options.type, options.target, payload, options, store)
    elif any(given) or options.supersedes:
        raise ProvenanceError("an event takes --type, --target and --payload; without any, the bundle alone is signed")
    else:
        mirrors = [mirror_hint(url) for url in options.mirror]
        _refuse_unsigned(options.file, paper, store, options)
        bundle = _naming(options.file, lambda: build_bundle(paper, signer, mirror_hints=mirrors, store=store))
    return _write(bundle, signer, options)


def run_cite(options: argparse.Namespace) -> int:
    """Append a citation to a paper's bundle."""
    paper, signer, store = read_document(options.paper), _signer(options), _store(options)
    target, payload = citation_payload(paper, options.citing, options.relation, claim=options.claim)
    bundle = _append(options.paper, paper, signer, CITATION, target, payload, options, store)
    return _write(bundle, signer, options)


def run_replicate(options: argparse.Namespace) -> int:
    """Append a replication record made from a benchmark's result to a paper's bundle."""
    if options.claim is None or not options.claim.strip():
        raise ProvenanceError("--claim: say in one sentence what was replicated; it is signed in your name")
    paper, signer, store = read_document(options.paper), _signer(options), _store(options)
    target, payload = replication_payload(
        paper,
        options.result,
        outcome=options.outcome,
        claim=options.claim,
        command=options.command,
        revision=options.revision,
        artifacts=options.artifact,
        standing=AS_REPORTED if options.as_reported else INDEPENDENT,
    )
    if options.as_reported:  # the event says so as well, where the payload is not looked at
        signer = dataclasses.replace(signer, signer_type="as-reported")
    bundle = _append(options.paper, paper, signer, REPLICATION, target, payload, options, store)
    return _write(bundle, signer, options)


ACTIONS = {
    "verify": run_verify,
    "show": run_show,
    "merge": run_merge,
    "keygen": run_keygen,
    "sign": run_sign,
    "replicate": run_replicate,
    "cite": run_cite,
}


def _append(
    path: str,
    paper: dict[str, Any],
    signer: Signer,
    event_type: str,
    target: str,
    payload: dict[str, Any],
    options: argparse.Namespace,
    store: TrustStore,
) -> dict[str, Any]:
    """Return the paper's bundle with a new event."""
    mirrors = [mirror_hint(url) for url in options.mirror]
    _refuse_unsigned(path, paper, store, options)
    how = {"supersedes": options.supersedes, "mirror_hints": mirrors, "store": store}
    return _naming(path, lambda: append(paper, signer, event_type, target, payload, **how))


def _refuse_unsigned(path: str, paper: dict[str, Any], store: TrustStore, options: argparse.Namespace) -> None:
    """With --require-signed-events, refuse to build on a state, whose events carry no signatures.

    Raises:
        ChecksFailed: It is one.
    """
    if not options.require_signed_events:
        return
    for check in _naming(path, lambda: _verify(paper, store, options)).failures:
        if check.name == SIGNED_EVENT:
            raise ChecksFailed(f"{path}: {check.where} {check.name}: {check.detail}")


def _verify(document: dict[str, Any], store: TrustStore, options: argparse.Namespace) -> Verification:
    return verify(document, store, require_signed_events=options.require_signed_events)


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
    for path in options.trust_registry:
        store.add_file(path, registry=True)
    return store


def _signer(options: argparse.Namespace) -> Signer:
    """Load the signer of --key; asks for the passphrase on a terminal."""
    passphrase = _passphrase_in(options.passphrase_file) if options.passphrase_file is not None else None
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
