"""What settings that save memory cost beside time, as measured (docs/bytes_per_parameter.md, working_sets.md)."""

from __future__ import annotations

from .models import Subject
from .settings import Settings

NEAREST = "rounds to nearest"
NOTES = {
    NEAREST: (
        "rounds to nearest: a 16-bit weight loses updates below half its last bit. SmolLM2-135M, 24 steps at lr 5e-5: "
        "held-out loss +0.148 above fp32 training's; with --optimizer.rounding stochastic, in the same memory, +0.0004"
    ),
    "trains": (
        "trains 1/n a step: a working set updates each weight in one turn of n. SmolLM2-135M, 64 steps, 8 chunks: "
        "held-out loss +0.21 above training all weights"
    ),
    "streams": (
        "streams: weights cross the link twice in each step, and states once each way; a step takes at least that "
        "long, whatever the card computes (gradfold plan --stream.offload cpu says how long)"
    ),
    "disk": "states on disk: each turn waits for the disk, of which no step time here knows",
}
"""Beginning of a cost -> the sentence that explains it."""


def costs_of(settings: Settings, subject: Subject) -> list[str]:
    """What these settings cost, in a few words each: beginnings of `NOTES`."""
    found = []
    if (
        settings.torch_dtype(subject.dtype).itemsize == 2
        and settings.master is None
        and settings.rounding != "stochastic"
    ):
        found.append(NEAREST)
    if (turns := settings.working_set) is not None:
        chunks = turns.chunks or subject.layers
        if chunks != 1:
            found.append(f"trains 1/{chunks or 'n'} a step")
        if turns.offload == "disk":
            found.append("states on disk")
    if settings.stream is not None:
        found.append("streams")
    return found


def notes_for(costs: list[str]) -> list[str]:
    """The sentences that explain costs, each once."""
    words = {cost: next(key for key in NOTES if key in cost) for cost in costs}
    return [NOTES[key] for key in dict.fromkeys(words.values())]
