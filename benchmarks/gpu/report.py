"""Write report.json and report.md: the machine, every row, and tables of the main figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .machine import without_paths
from .result_files import DIED, ERROR, FAILED, LEFT_OUT, OK, TIME, ResultRow
from .suites import Suite

DRY = "**A dry run: Triton's interpreter, tiny shapes, a clock on the CPU. These figures mean nothing.**"


class SuiteRun(NamedTuple):
    """How the run of one suite ended."""

    suite: Suite
    status: str
    seconds: float
    limit_s: float
    error: str = ""


def is_broken(run: SuiteRun, rows: Sequence[ResultRow]) -> bool:
    """Return whether a check failed, or could not be made for another reason than time: a crash is not correct."""
    if not run.suite.judged:
        return False
    return run.status == DIED or any(row["status"] not in (OK, LEFT_OUT, TIME) for row in rows)


def write_report(
    out: Path,
    machine: Mapping[str, Any],
    runs: Sequence[SuiteRun],
    rows: Mapping[str, Sequence[ResultRow]],
    dry: bool,
    command: str,
    budget_seconds: float,
    seconds: float,
) -> None:
    """Write both files anew."""
    result = {
        "benchmark": "gpu",
        "dry_run": dry,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "revision": machine.get("revision"),
        "machine": dict(machine),
        "budget_seconds": budget_seconds,
        "seconds": round(seconds, 1),
        "correct": not any(is_broken(run, rows[run.suite.name]) for run in runs),
        "suites": [
            {
                "name": run.suite.name,
                "title": run.suite.title,
                "command": f"bash benchmarks/gpu/run.sh --only {run.suite.name}",
                "status": run.status,
                "seconds": round(run.seconds, 1),
                "limit_seconds": round(run.limit_s, 1),
                "error": run.error,
                "rows": list(rows[run.suite.name]),
            }
            for run in runs
        ],
    }
    result = _cleaned(result)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text("\n".join(_page(result, runs)) + "\n", encoding="utf-8")


def _cleaned(value: Any) -> Any:
    """The same without paths of this machine, and floats with the digits that mean something."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, Mapping):
        return {key: _cleaned(one) for key, one in value.items()}
    return [_cleaned(one) for one in value] if isinstance(value, list | tuple) else value


def _page(result: Mapping[str, Any], runs: Sequence[SuiteRun]) -> list[str]:
    machine = result["machine"]
    lines = ["# What the GPU says", ""]
    if result["dry_run"]:
        lines += [DRY, ""]
    facts = {
        "card": machine["card"],
        "memory": f"{machine['memory_gib']} GiB",
        **{name: machine[name] for name in ("capability", "multiprocessors", "l2_mib") if name in machine},
        **{name: value for name, value in machine.items() if "." in name or name.startswith("driver")},
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
        "revision": machine["revision"] or "unknown",
        "sources": machine["sources"],
        "date": result["date"],
        "command": f"`{result['command']}`",
        "checks": "all that were made passed" if result["correct"] else "**some did not pass**",
    }
    lines += _table(["", ""], [[name, str(value)] for name, value in facts.items()])
    lines += ["", "Medians; ratios with quartiles, of interleaved rounds. A ratio below 1 is in favour of ours.", ""]
    overview = [
        [
            f"`{suite['command'].removeprefix('bash benchmarks/gpu/run.sh ')}`",
            suite["status"],
            f"{suite['seconds']} of {suite['limit_seconds']}",
            _counts(suite["rows"]),
        ]
        for suite in result["suites"]
    ]
    lines += [*_table(["suite", "", "seconds", "rows"], overview), ""]
    for suite, run in zip(result["suites"], runs, strict=True):
        lines += _suite(suite, run)
    return lines


def _counts(rows: Sequence[ResultRow]) -> str:
    statuses = [row["status"] for row in rows]
    return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)) or "none"


def _suite(suite: Mapping[str, Any], run: SuiteRun) -> list[str]:
    lines = [f"## {suite['name']}", "", suite["title"] + ".", ""]
    if suite["error"]:
        lines += [f"**{suite['status']}**", "", *_quoted(suite["error"]), ""]
    measured = [row for row in suite["rows"] if row["status"] in (OK, FAILED)]
    columns = [name for name in run.suite.columns if any(name in row for row in measured)]
    if run.suite.best is not None:
        lines += _best(measured, *run.suite.best, columns)
    if measured:
        table = [[row["key"], row["status"], *(_cell(row.get(name)) for name in columns)] for row in measured]
        lines += [*_table(["", "", *columns], table), ""]
    notes = [row for row in suite["rows"] if row["status"] != OK or row.get("note")]
    for row in notes:
        said = str(row.get("why") or row.get("note") or "").strip()
        lines.append(f"- {row['key']}: {row['status']}" + (f": {_short(said)}" if said else ""))
        if row["status"] in (ERROR, DIED) and "traceback" in row:
            lines += ["", *_quoted(row["traceback"][-800:]), ""]
    return [*lines, ""] if notes else lines


def _best(rows: Sequence[ResultRow], group: str, figure: str, columns: Sequence[str]) -> list[str]:
    """The smallest figure of each group."""
    found: dict[str, ResultRow] = {}
    for row in rows:
        if figure in row and (row[group] not in found or row[figure] < found[row[group]][figure]):
            found[row[group]] = row
    if not found:
        return []
    table = [[_cell(row.get(name)) for name in columns] for row in found.values()]
    return [f"The best of each {group} (above 1: the table's own):", "", *_table(columns, table), ""]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in line) + " |" for line in lines]


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def _quoted(text: str) -> list[str]:
    return ["```", *text.strip().replace("```", "'''").splitlines()[-20:], "```"]
