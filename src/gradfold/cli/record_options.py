"""The options of `gradfold record` and its subcommands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from gradfold.provenance import ProvenanceError
from gradfold.provenance.events import LISTS


class Parser(argparse.ArgumentParser):
    """Says what is wrong by the convention of the command line: one line, exit code 2."""

    def __init__(self, *words: object, **options: object):
        super().__init__(*words, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise ProvenanceError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser; `options.action` is the subcommand's name."""
    parser = Parser(
        prog="gradfold record",
        description="Verify, show, merge and sign Pith open-graph documents.",
        epilog="Exit codes: 0 verified or done, 1 a check failed or a key is not trusted, 2 unreadable input.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    verify = actions.add_parser("verify", help="check every digest, signature, link and state")
    verify.add_argument("files", nargs="+", metavar="FILE", help="bundles, states or single events")
    verify.add_argument("--all", action="store_true", help="list the checks that passed too")

    show = actions.add_parser("show", help="a card of a paper: title, authors, ids, events, trust")
    show.add_argument("file", metavar="FILE")

    merge = actions.add_parser("merge", help="one state from the events of any documents about a paper")
    merge.add_argument("files", nargs="+", metavar="FILE", help="bundles, states or single events, in any order")

    keygen = actions.add_parser("keygen", help="a new Ed25519 key: KEY, for you alone, and KEY.pub")
    keygen.add_argument("--passphrase", action="store_true", help="ask for a passphrase to lock the key with")

    sign = actions.add_parser("sign", help="append an event to a paper's bundle, or sign the bundle anew")
    sign.add_argument("file", metavar="BUNDLE", help="the paper's bundle or state")
    sign.add_argument("--type", choices=LISTS, help="of the event")
    sign.add_argument("--target", help="what the event is about")
    sign.add_argument("--payload", metavar="FILE", help="JSON object with what the event says")

    replicate = actions.add_parser("replicate", help="append a replication record made of a benchmark's result")
    replicate.add_argument("--paper", required=True, metavar="BUNDLE", help="the paper's bundle or state")
    replicate.add_argument("--result", required=True, metavar="RESULT.json", help="as in benchmarks/results")
    replicate.add_argument("--claim", help="what was tried, in a sentence")
    replicate.add_argument("--command", help="how the result was made, if it does not say so itself")
    replicate.add_argument("--revision", help="commit of the code, if neither the result nor git can tell")
    replicate.add_argument(
        "--artifact", action="append", default=[], metavar="FILE", help="a file to give the digest of"
    )

    for action in (sign, replicate):
        action.add_argument("--key", required=True, metavar="KEY", help="private key, from `gradfold record keygen`")
        action.add_argument(
            "--supersedes", action="append", default=[], metavar="ID", help="event id that this replaces"
        )
        action.add_argument(
            "--mirror", action="append", default=[], metavar="URL", help="where the bundle will be found"
        )
    for action in (keygen, sign, replicate):
        action.add_argument("--signer-id", help="your name in documents (default: that in KEY.pub)")
        action.add_argument("--key-id", help="the key's name in documents (default: that in KEY.pub)")
        action.add_argument("--passphrase-file", metavar="FILE", help="file with the key's passphrase")
    for action in (merge, keygen, sign, replicate):
        action.add_argument("-o", "--out", required=True, metavar="FILE")
    for action in (verify, show, merge, sign, replicate):
        action.add_argument(
            "--trust-key", action="append", default=[], metavar="FILE", help="public key(s) that you trust; repeatable"
        )
    for action in actions.choices.values():
        action.add_argument("--json", action="store_true", help="print JSON")
    return parser
