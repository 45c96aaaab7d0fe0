"""A suite whose rows fail, one of them with its process, and one that does not."""

import os

import torch

from benchmarks.gpu.worker import Case, Failed


def raises():
    raise RuntimeError(f"cannot read {os.path.abspath(__file__)}")


def out_of_memory():
    raise torch.cuda.OutOfMemoryError("tried to allocate 80 GiB")


def says_no():
    raise Failed("bits: 3% of weight differ", error=0.25)


def cases(context):
    return [
        Case("raises", raises),
        Case("aborts", os.abort),
        Case("out of memory", out_of_memory),
        Case("says no", says_no),
        Case("fine", lambda: {"error": 0.125}),
    ]
