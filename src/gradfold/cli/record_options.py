"""Command line options of ``gradfold record`` and its subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from gradfold.provenance import OUTCOMES, RELATIONS, ProvenanceError
from gradfold.provenance.events import LISTS
from gradfold.provenance.vocabulary import known_word


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with exit status 2, like those of all commands."""

    def __init__(self, *words: object, **options: object):
        super().__init__(*words, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise ProvenanceError with the message."""
        raise ProvenanceError(f"{message}; see {self.prog} --help")


def _word(option: str, known: Sequence[str]) -> Callable[[str], str]:
    """Return a converter to the registry's spelling, for an option that takes one of its words."""

    def word(text: str) -> str:
        return known_word(option, text, known)

    return word


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; ``options.action`` is the name of the subcommand."""
    parser = Parser(
        prog="gradfold record",
        description="Verify, show, merge and sign Pith open-graph documents.",
        epilog="Exit status: 0 verified or done, 1 a check failed or a key is not trusted, 2 unreadable input.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    verify = actions.add_parser("verify", help="verify all digests, signatures, links and states")
    verify.add_argument("files", nargs="+", metavar="FILE", help="bundles, states or single events")
    verify.add_argument("--all", action="store_true", help="also list checks that passed")

    show = actions.add_parser("show", help="show a summary of a paper: title, authors, ids, events, trust")
    show.add_argument("file", metavar="FILE", help="bundle, state or single event")

    merge = actions.add_parser("merge", help="merge documents about one paper into a state")
    merge.add_argument("files", nargs="+", metavar="FILE", help="bundles, states or single events, in any order")

    keygen = actions.add_parser("keygen", help="generate an Ed25519 key pair: KEY (private) and KEY.pub (public)")
    keygen.add_argument("--passphrase", action="store_true", help="ask for a passphrase that encrypts the private key")

    sign = actions.add_parser("sign", help="append a signed event to a paper's bundle, or re-sign the bundle")
    sign.add_argument("file", metavar="BUNDLE", help="bundle or state of the paper")
    sign.add_argument("--type", choices=LISTS, help="event type")
    sign.add_argument("--target", help="identifier of what the event is about")
    sign.add_argument("--payload", metavar="FILE", help="JSON file with the payload of the event")

    replicate = actions.add_parser("replicate", help="append a replication record made from a benchmark result")
    replicate.add_argument("--paper", required=True, metavar="BUNDLE", help="bundle or state of the paper")
    replicate.add_argument(
        "--result", required=True, metavar="RESULT.json", help="result file of a benchmark, as in benchmarks/results"
    )
    replicate.add_argument(
        "--outcome",
        type=_word("--outcome", OUTCOMES),
        choices=OUTCOMES,
        metavar="OUTCOME",
        default=OUTCOMES[0],
        help=f"whether the claim held, did not, or was formalised: {', '.join(OUTCOMES)} (default: {OUTCOMES[0]})",
    )
    replicate.add_argument("--claim", help="the replicated claim, in one sentence; it must be given")
    replicate.add_argument(
        "--as-reported",
        action="store_true",
        help="the result was made by another revision or on another machine than this one: sign it as what is reported",
    )
    replicate.add_argument("--command", help="command that produced the result, if the file does not contain it")
    replicate.add_argument("--revision", help="commit of the code, if neither the file nor git knows it")
    replicate.add_argument(
        "--artifact",
        action="append",
        default=[],
        metavar="FILE",
        help="further file to record with its digest; repeatable",
    )

    cite = actions.add_parser("cite", help="append a signed citation of a paper by another work")
    cite.add_argument("--paper", required=True, metavar="BUNDLE", help="bundle or state of the paper that is cited")
    cite.add_argument(
        "--citing", required=True, metavar="WORK", help="the work that cites it: a pith number, arXiv id, DOI or URL"
    )
    cite.add_argument(
        "--relation",
        required=True,
        type=_word("--relation", RELATIONS),
        choices=RELATIONS,
        metavar="RELATION",
        help=f"what it does with the paper: {', '.join(RELATIONS)}",
    )
    cite.add_argument("--claim", help="what exactly it supports, refutes, uses ..., in one sentence")

    for action in (sign, replicate, cite):
        action.add_argument(
            "--key", required=True, metavar="KEY", help="private key file from `gradfold record keygen`"
        )
        action.add_argument(
            "--supersedes",
            action="append",
            default=[],
            metavar="ID",
            help="id of an event that this one replaces; repeatable",
        )
        action.add_argument(
            "--mirror",
            action="append",
            default=[],
            metavar="URL",
            help="URL where the bundle will be published; repeatable",
        )
    for action in (keygen, sign, replicate, cite):
        action.add_argument("--signer-id", help="name of the signer in documents (default: from KEY.pub)")
        action.add_argument("--key-id", help="name of the key in documents (default: from KEY.pub)")
        action.add_argument("--passphrase-file", metavar="FILE", help="file that contains the passphrase of the key")
    for action in (merge, keygen, sign, replicate, cite):
        action.add_argument("-o", "--out", required=True, metavar="FILE", help="output file")
    for action in (verify, show, merge, sign, replicate, cite):
        action.add_argument(
            "--trust-key",
            action="append",
            default=[],
            metavar="FILE",
            help="file with public keys to trust for what they sign, but not to create records; repeatable",
        )
        action.add_argument(
            "--trust-registry",
            action="append",
            default=[],
            metavar="FILE",
            help="file with public keys to trust as registries, which create records; repeatable",
        )
        action.add_argument(
            "--require-signed-events",
            action="store_true",
            help="refuse events without a signature of their own, so everything that only a state says",
        )
    for action in actions.choices.values():
        action.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser
