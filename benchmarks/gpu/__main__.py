"""Run the suites, each in processes of its own and within a time budget, and write the report.

bash benchmarks/gpu/run.sh [--dry-run] [--only SUITE] [--out DIR] [--budget-seconds 520] [--fresh]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .machine import ROOT, run_key
from .report import SuiteRun, is_broken, write_report
from .result_files import DIED, TIME, ResultFile, rows_in
from .suites import SUITES, Suite

OUT, DRY_OUT = ROOT / "benchmarks" / "results" / "gpu", ROOT / "build" / "gpu-dry-run"
REPORT_SECONDS = 10.0  # reserved for the report
GRACE_SECONDS = 5.0  # for a process to finish its current row
TIME_UP, AGAIN = 3, 75  # exit status of worker.py
MOST_STARTS = 40  # of each process of a suite


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the suites; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu/run.sh",
        description="Check and measure on a GPU: correctness, step times, tile sizes, memory.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run tiny shapes in Triton's interpreter, without a GPU; figures mean nothing",
    )
    parser.add_argument(
        "--only", action="append", choices=[suite.name for suite in SUITES], help="run only this suite; repeatable"
    )
    parser.add_argument("--out", type=Path, help="folder for the report and its rows")
    parser.add_argument("--budget-seconds", type=float, default=520.0, help="time limit of the whole run (default 520)")
    parser.add_argument(
        "--suite-seconds", type=float, help="time limit of each suite (default: its share of the budget)"
    )
    parser.add_argument("--fresh", action="store_true", help="discard earlier rows and measure everything again")
    args = parser.parse_args(argv)
    suites = [suite for suite in SUITES if not args.only or suite.name in args.only]
    words = ["bash", "benchmarks/gpu/run.sh", *(["--dry-run"] if args.dry_run else [])]
    words += [word for name in args.only or [] for word in ("--only", name)]
    out = args.out or (DRY_OUT if args.dry_run else OUT)
    return run(
        suites, out.resolve(), args.dry_run, args.budget_seconds, args.suite_seconds, args.fresh, " ".join(words)
    )


def run(
    suites: Sequence[Suite],
    out: Path,
    dry: bool,
    budget_seconds: float,
    suite_seconds: float | None = None,
    fresh: bool = False,
    command: str = "",
) -> int:
    """Run the suites within the time budget, and write the report after each.

    Returns:
        Exit status: 0 if all checks passed, 1 if one failed or could not be made, 2 if there is no GPU.
    """
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes are killed
    machine = ask_machine(dry)
    if "error" in machine:
        print(machine["error"], file=sys.stderr)
        return 2
    folder = out / "rows" / run_key(machine)
    if fresh and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for suite in suites:
        for path in folder.glob(f"{suite.name}.*.json"):
            ResultFile(path).retry()
    runs: list[SuiteRun] = []
    for index, suite in enumerate(suites):
        left = budget_seconds - REPORT_SECONDS - (time.monotonic() - start)
        part = suite.share / sum(other.share for other in suites[index:])
        limit = left if dry else left * part  # a dry run is there to walk all of them
        limit = limit if suite_seconds is None else min(limit, suite_seconds)
        runs.append(run_suite(suite, folder, dry, max(1.0, limit)))
        rows = {one.name: rows_in(folder, one.name) for one in suites}
        write_report(out, machine, runs, rows, dry, command, budget_seconds, time.monotonic() - start)
        said = f" {runs[-1].error.strip().splitlines()[-1]}" if runs[-1].error else ""
        print(
            f"{suite.name}: {runs[-1].status}, {len(rows[suite.name])} rows, {runs[-1].seconds:.0f} s{said}", flush=True
        )
    print(f"report: {os.path.relpath(out)}/report.md")
    return int(any(is_broken(one, rows_in(folder, one.suite.name)) for one in runs))


def ask_machine(dry: bool) -> dict[str, Any]:
    """Describe the machine, by a process that ends before anything is measured."""
    try:
        words = [sys.executable, "-m", "benchmarks.gpu.machine"]
        done = subprocess.run(
            words, cwd=ROOT, env=_environment(dry), capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": "the card did not answer within 120 s"}
    if done.returncode:
        return {"error": f"{done.stderr[-2000:]}\nno GPU here? --dry-run walks the suites in Triton's interpreter"}
    return json.loads(done.stdout.splitlines()[-1])


def _environment(dry: bool, processes: int = 1) -> dict[str, str]:
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [found.get("PYTHONPATH")])])
    found["TOKENIZERS_PARALLELISM"] = "false"
    found["HF_HUB_OFFLINE"] = "1"
    found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    found.pop("TRITON_INTERPRET", None)
    if dry:
        found |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    return found


class Process:
    """One process of a suite; it is started again as long as it asks for it or dies of a single row."""

    def __init__(self, suite: Suite, index: int, shards: int, folder: Path, dry: bool, end: float):
        self.suite, self.dry, self.end = suite, dry, end
        self.shard, self.shards = f"{index}/{shards}", shards
        self.results = folder / f"{suite.name}.{index}.json"
        self.log = folder / f"{suite.name}.{index}.log"
        self.starts, self.status, self.error = 0, "", ""
        self.start()

    def start(self) -> None:
        """Start the process with the time that is left."""
        self.starts += 1
        seconds = max(0.0, self.end - time.monotonic())
        words = [sys.executable, "-m", "benchmarks.gpu.worker", self.suite.module, str(self.results)]
        words += ["--shard", self.shard, "--seconds", f"{seconds:.1f}"]
        self.known = len(ResultFile(self.results).rows)
        with self.log.open("w", encoding="utf-8") as log:
            self.child = subprocess.Popen(
                words,
                cwd=ROOT,
                env=_environment(self.dry, self.shards),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Return whether it has ended for good; start it again if it should."""
        code = self.child.poll()
        if code is None:
            if time.monotonic() < self.end + GRACE_SECONDS:
                return False
            self.kill()
            ResultFile(self.results).interrupted(TIME, f"ended after {self.suite.name}'s time")
            self.status = TIME
            return True
        if code in (0, TIME_UP):
            self.status = "done" if code == 0 else TIME
            return True
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
        if code != AGAIN:
            ResultFile(self.results).interrupted(DIED, f"exit status {code}: {tail}")
        if time.monotonic() >= self.end:
            self.status = TIME
            return True
        if len(ResultFile(self.results).rows) > self.known and self.starts < MOST_STARTS:
            self.start()
            return False
        self.status, self.error = DIED, f"exit status {code}: {tail}"
        return True

    def kill(self) -> None:
        """Kill the process and everything it has started."""
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()


def run_suite(suite: Suite, folder: Path, dry: bool, limit: float) -> SuiteRun:
    """Run all processes of a suite until they have ended or the time is up."""
    start = time.monotonic()
    shards = 1 if dry else max(1, min(suite.shards, (os.cpu_count() or 2) - 2))
    processes: list[Process] = []
    try:
        for index in range(shards):
            processes.append(Process(suite, index, shards, folder, dry, start + limit))
        waiting = list(processes)
        while waiting:
            waiting = [process for process in waiting if not process.poll()]
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.child.poll() is None:
                process.kill()
    statuses = [process.status for process in processes]
    status = next((wanted for wanted in (DIED, TIME) if wanted in statuses), "done")
    error = next((process.error for process in processes if process.error), "")
    return SuiteRun(suite, status, time.monotonic() - start, limit, error)


if __name__ == "__main__":
    sys.exit(main())
