"""A suite that does not come back from its first row."""

import time

from benchmarks.gpu.worker import Case


def cases(context):
    return [Case("hangs", lambda: time.sleep(600)), Case("never begun", lambda: {"value_ms": 0.5})]
