"""Terminal output of ``gradfold record``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gradfold.provenance import Status, Verification
from gradfold.provenance.events import LISTS, OTHER_RECORDS, RECORD
from gradfold.provenance.report import Check, typed
from gradfold.provenance.vocabulary import WORDS

STYLES = {
    Status.PASS: "green",
    Status.FAIL: "bold red",
    Status.UNTRUSTED: "bold yellow",
    Status.NOT_PRESENT: "dim",
    Status.NOT_CHECKED: "cyan",
}
MOST_ROWS = 60


def print_report(path: str, report: Verification, every: bool = False, console: Console | None = None) -> None:
    """Print the verdict and a table of the checks that did not pass; others are counted, or listed if ``every``."""
    console = console or Console(highlight=False)
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="dim")
    table.add_column("status", no_wrap=True)
    table.add_column("where", overflow="fold")
    table.add_column("check", overflow="fold")
    table.add_column("", overflow="fold")
    checks = [check for check in report.checks if every or check.status is not Status.PASS]
    checks.sort(key=lambda check: check.status not in (Status.FAIL, Status.UNTRUSTED))  # the bad news first
    for check in checks if every else checks[:MOST_ROWS]:
        table.add_row(*_check_cells(check))
    passed = Counter(check.where for check in report.checks if check.status is Status.PASS and not every)
    for where, number in list(passed.items())[:MOST_ROWS]:
        table.add_row(Text("pass", style="green"), Text(clean(where)), Text(f"{number} checks"), Text(""))
    style = "bold green" if report.verified else "bold yellow" if not report.failures else "bold red"
    console.print(Text.assemble((clean(path), "bold"), f"  {report.kind}  ", (clean(report.verdict), style)))
    console.print(Text(clean(report.subject or "no pith number"), style="dim"))
    console.print(table)
    if not every and len(checks) > MOST_ROWS:
        console.print(Text(f"... and {len(checks) - MOST_ROWS} more; --all or --json lists them", style="dim"))
    counts = ", ".join(f"{number} {status}" for status, number in report.counts().items() if number)
    console.print(Text(f"{len(report.checks)} checks: {counts}\n"))


def card_of(document: dict[str, Any], report: Verification) -> dict[str, Any]:
    """Return the summary of a document's paper, ready for --json; empty for hostile documents."""
    state = typed(document, "state", dict) or document
    current = typed(state, "current", dict) or {}
    snapshots = _entries(current, "graph_snapshots")
    paper: dict[str, Any] = {}
    for entry in snapshots:
        snapshot = typed(typed(entry, "payload", dict), "graph_snapshot", dict)
        paper = typed(snapshot, "paper", dict) or paper
    record = typed(document, "canonical_record", dict) or typed(current, "canonical_record", dict) or {}
    aliases = typed(document, "source_aliases", list) or typed(current, "source_aliases", list) or []
    metadata = typed(record, "metadata", dict) or {}
    return {
        "kind": report.kind,
        "title": typed(paper, "title", str),
        "authors": typed(paper, "authors_text", str),
        "pith_number": report.subject,
        "aliases": {
            str(alias["alias_kind"]): str(alias["alias_value"])
            for alias in aliases
            if isinstance(alias, dict) and {"alias_kind", "alias_value"} <= alias.keys()
        },
        "submitted_at": typed(metadata, "submitted_at", str),
        "license": typed(metadata, "license", str),
        "events": _event_entries(current, document),
        "equivocations": len(typed(state, "equivocations", list) or []),
        "invalid_events": len(typed(state, "invalid_events", list) or []),
        "verified": report.verified,
        "verdict": report.verdict,
        "failures": [check.as_dict() for check in report.failures],
        "counts": report.counts(),
    }


def print_card(card: dict[str, Any], console: Console | None = None) -> None:
    """Print the summary of one paper."""
    console = console or Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name in ("authors", "pith_number", "submitted_at", "license"):
        if card[name]:
            grid.add_row(name.replace("_", " "), clean(card[name]))
    for kind, value in card["aliases"].items():
        if not kind.startswith("pith_short"):
            grid.add_row(clean(kind.replace("_", " ")), clean(value))
    for event in card["events"][:MOST_ROWS]:
        grid.add_row(clean(event["type"].replace("_", " ")), Text(clean(f"{event['created_at']}  {event['signer']}  ")))
        for said in (event["word"], event["claim"]):
            if said:
                grid.add_row("", Text(clean(said)))
    if len(card["events"]) > MOST_ROWS:
        grid.add_row("", f"... and {len(card['events']) - MOST_ROWS} events more")
    for name in ("equivocations", "invalid_events"):
        if card[name]:
            grid.add_row(name.replace("_", " "), Text(str(card[name]), style="bold yellow"))
    style = "green" if card["verified"] else "bold red" if card["failures"] else "bold yellow"
    grid.add_row("trust", Text(clean(card["verdict"]), style=style))
    for name, number in Counter(failure["check"] for failure in card["failures"]).most_common(8):
        grid.add_row("", Text(f"{clean(name)}{f' ({number} times)' if number > 1 else ''} fails", style="red"))
    title = clean(card["title"] or "a paper without a title here")
    console.print(Panel(grid, title=Text(title, style="bold"), title_align="left", border_style="dim"))


def clean(text: str, most: int = 600) -> str:
    """Return text of unknown origin without control characters and of limited length."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:most])
    return shown if len(text) <= most else f"{shown} ..."


def _check_cells(check: Check) -> tuple[Text, Text, Text, Text]:
    return (
        Text(str(check.status), style=STYLES[check.status]),
        Text(clean(check.where)),
        Text(clean(check.name)),
        Text(clean(check.detail)),
    )


def _event_entries(current: dict[str, Any], document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events of a state, or the one event that the document is."""
    found = [(RECORD, current.get(RECORD)), *((RECORD, entry) for entry in _entries(current, OTHER_RECORDS))]
    for event_type, name in LISTS.items():
        found += [(event_type, entry) for entry in _entries(current, name)]
    if "event_type" in document:
        found = [(str(document["event_type"]), document)]
    return [
        {
            "type": event_type,
            "event_id": typed(entry, "event_id", str),
            "created_at": typed(entry, "created_at", str),
            "signer": typed(typed(entry, "signer", dict), "signer_id", str),
            "word": _word_of(entry, event_type),
            "claim": typed(_said(entry, event_type), "claim", str),
        }
        for event_type, entry in found
        if isinstance(entry, dict)
    ]


def _said(entry: dict[str, Any], event_type: str) -> dict[str, Any]:
    """Return the object in the payload of a citation or replication record; empty for other events."""
    holder, _, _ = WORDS.get(event_type, ("", "", ()))
    return typed(typed(entry, "payload", dict), holder, dict) or {}


def _word_of(entry: dict[str, Any], event_type: str) -> str | None:
    """Return what a replication came to, or who cites the paper and how; None for other events."""
    _, name, _ = WORDS.get(event_type, ("", "", ()))
    said = _said(entry, event_type)
    word, citing = typed(said, name, str), typed(said, "citing", str)
    return " ".join(text for text in (citing, word.replace("_", " ")) if text) if word else None


def _entries(current: dict[str, Any], name: str) -> list[Any]:
    return typed(current, name, list) or []
