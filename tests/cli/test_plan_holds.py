"""A plan against the run of the very line that it prints: the peak of the run's own steps, however it is trained."""

import itertools
import json
import shlex
from pathlib import Path

import pytest

from gradfold.planner import search
from gradfold.train import report
from tests.train.templates import turns
from tests.train.tiny import sentence

QUIET = ["--evaluation.sample-tokens", 0, "--evaluation.sequences", 1, "--checkpoint.keep", 1]
SIZE = ["--batch", 2, "--tokens", 64, "--device", "cpu"]
EITHER = {
    "checkpointing": (["--no-gradient-checkpointing"], ["--gradient-checkpointing"]),
    "accumulate 4": (["--gradient.accumulate", 1], ["--gradient.accumulate", 4]),
    "clip": (["--gradient.clip-norm", "None"], ["--gradient.clip-norm", 1]),
    "int8": (["--optimizer.states", "fp32"], ["--optimizer.states", "int8"]),
}
"""What can be on or off, each with the others."""
HEAD = ["--head", "plain"]
PLAIN = ["--head", "fold", *(word for off, _ in EITHER.values() for word in off)]
ALL = ["--head", "fold", *(word for _, on in EITHER.values() for word in on)]
TURNS = ["--steps", 4, "--working-set.chunks", 2, "--working-set.interval", 1]
LONG = ("text", lambda i: {"text": sentence(i, 200)})
SHORT = ("text", lambda i: {"text": sentence(i, 20 + i % 9)})
CHATS = ("chats", lambda i: {"messages": turns(sentence(i, 3), sentence(i + 9, 3 + i % 9))})
PROMPTS = ("prompts", lambda i: {"prompt": sentence(i, 3), "completion": " " + sentence(i + 9, 2 + i % 20)})
PAIRS = (
    "pairs",
    lambda i: {"prompt": sentence(i, 3), "chosen": f" {sentence(i + 50, 1 + i % 9)}", "rejected": " " + sentence(i, 2)},
)
SAME = ("same pairs", lambda i: PAIRS[1](8))
KNOWN = ("known pairs", lambda i: PAIRS[1](i) | {"ref_chosen_logps": -1.0 * i, "ref_rejected_logps": -2.0})

CASES = {
    ", ".join(name for name, one in zip(EITHER, on, strict=True) if one) or "folded": (
        ["--head", "fold", *(word for words, one in zip(EITHER.values(), on, strict=True) for word in words[one])],
        LONG,
    )
    for on in itertools.product((0, 1), repeat=len(EITHER))
}
CASES |= {
    "plain head": ([*PLAIN[2:], *HEAD], LONG),
    "plain head, all": ([*ALL[2:], *HEAD], LONG),
    "bf16": ([*PLAIN, "--dtype", "bfloat16"], LONG),
    "bf16, all": ([*ALL, "--dtype", "bfloat16", "--optimizer.rounding", "stochastic"], LONG),
    "bf16, masters": ([*ALL, "--dtype", "bfloat16", "--optimizer.master", "split8"], LONG),
    "turns": ([*PLAIN, *TURNS], LONG),
    "turns, all": ([*ALL, *TURNS], LONG),
    "turns, at rest": ([*PLAIN, *TURNS, "--working-set.rest", "sgd"], LONG),
    "turns, at rest, all": ([*ALL, *TURNS, "--working-set.rest", "sign"], LONG),
    "turns in host memory": ([*PLAIN, *TURNS, "--working-set.offload", "cpu"], LONG),
    "not packed": ([*PLAIN, "--text.no-packing"], LONG),
    "short, not packed": ([*PLAIN, "--text.no-packing"], SHORT),
    "short, not packed, all": ([*ALL, "--text.no-packing"], SHORT),
    "short, packed": ([*ALL], SHORT),
    "an epoch": ([*ALL, "--epochs", 1, "--text.no-packing"], SHORT),
    "chats": ([*PLAIN], CHATS),
    "chats, not packed": ([*ALL, "--text.no-packing"], CHATS),
    "prompts": ([*ALL], PROMPTS),
    "prompts, not packed": ([*PLAIN, "--text.no-packing"], PROMPTS),
    "preferences": ([*PLAIN], PAIRS),
    "preferences, all": ([*ALL], PAIRS),
    "preferences, plain head": ([*PLAIN[2:], *HEAD], PAIRS),
    "preferences, a frozen reference": ([*PLAIN, "--preference.reference", "frozen"], PAIRS),
    "preferences, a frozen reference, all": ([*ALL, "--preference.reference", "frozen"], PAIRS),
    "preferences, a frozen reference, plain head": ([*PLAIN[2:], *HEAD, "--preference.reference", "frozen"], PAIRS),
    "preferences, a frozen reference, turns": ([*ALL, *TURNS, "--preference.reference", "frozen"], SAME),
    "preferences, known": ([*PLAIN], KNOWN),
    "preferences, known and frozen": ([*PLAIN, "--preference.reference", "frozen"], KNOWN),
}
QUICK = ("preferences, a frozen reference, all",)


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK)]
)
def test_the_printed_line_takes_what_was_planned(case, place, tiny, said, measured, monkeypatch):
    """Within 2%, and so is what the run reports of itself."""
    monkeypatch.setattr(search, "CHUNKS", ())  # no other working sets, which take long to trace
    for draw in ("draw_loss", "draw_memory"):
        monkeypatch.setattr(report, draw, lambda *_, **__: None)
    more, (kind, row) = CASES[case]
    Path(f"{kind}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
    long = [] if {"--steps", "--epochs"} & set(more) else ["--steps", 3]
    words = ["--model", tiny, "--data", f"{kind}.jsonl", *SIZE, *QUIET, *more, *long]
    made = json.loads(said("plan", *words, "--budget", "1GiB", "--no-compare", "--json"))
    found = made["search"]["fits"][0]
    assert found["peak_bytes"] == made["peak_bytes"]  # the flags leave nothing to the search
    said(*shlex.split(found["train"])[1:], "--out", "run")
    assert max(measured) == pytest.approx(found["peak_bytes"], rel=0.02)
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["step_memory"]["folded"]["peak_bytes"] == pytest.approx(max(measured), rel=0.02)
