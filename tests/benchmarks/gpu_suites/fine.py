"""A suite that measures two rows, and something new each time."""

import time

from benchmarks.gpu.worker import Case, LeftOut


def left_out():
    raise LeftOut("there is no such library")


def cases(context):
    return [
        Case("first", lambda: {"value_ms": 1.5, "nonce": time.time_ns()}),
        Case("second", lambda: {"value_ms": 0.5, "nonce": time.time_ns()}),
        Case("third", left_out),
    ]
