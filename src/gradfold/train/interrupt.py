"""Ctrl-C and SIGTERM, held back until the step that runs is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from .errors import TrainError

SAME_S = 0.5  # signals so close to each other are one
NOTED = b"\ngradfold: finishing this step and saving; again (Ctrl-C) to abort\n"


class Interrupted(TrainError):
    """The run was asked to stop and has saved all it had."""

    exit_code = 130
    on_all_ranks = True

    def __init__(self, message: str, checkpoint: Path | None):
        super().__init__(message)
        self.checkpoint = checkpoint


class StopRequest:
    """Whether a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.made = False
        self._first = 0.0

    def __bool__(self) -> bool:
        return self.made

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self.made and many and now - self._first < SAME_S:  # torchrun hands on what the terminal has sent to all
            return
        if self.made:  # the second time means: now
            raise KeyboardInterrupt
        self.made, self._first = True, now
        if os.environ.get("RANK", "0") != "0":
            return
        with contextlib.suppress(OSError):  # not print(): the signal may have come in the middle of one
            os.write(2, NOTED)


@contextlib.contextmanager
def held_back_signals() -> Iterator[StopRequest]:
    """In the block the first SIGINT or SIGTERM only makes the request true; a second one raises KeyboardInterrupt."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request._note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
