"""A process that trains in children of its own, and lets them die at given instants.

It has computed nothing and has no threads, so that a child is as good as a process that was just started, but does not
import all over again. Children of a process that has trained are not: torch may refuse the threads that they inherit.

Reads arguments of `run`, a line of JSON each; writes the status of each child, as `os.waitpid` has it.
"""

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from rich.console import Console

from gradfold.train import loop, report
from gradfold.train.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from gradfold.train.display import Display
from gradfold.workset import Rotation
from tests.train.tiny import recipe

WHERE = {"save": (loop, "_save"), "switch": (Rotation, "_sleep"), "step": (loop, "_step")}


def die_in(owner, name, call, seconds):
    """Let this process die, wherever it is, so many seconds after the call number `call` of a function has begun."""
    plain, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))  # nothing catches this signal
        return plain(*args, **kwargs)

    setattr(owner, name, dying)


def run(model, data, settings, out, how, call, seconds):
    """Begin or resume a run."""
    report._trace_memory, report.draw_loss = lambda run, display: {}, lambda records, path, name: None
    die_in(*WHERE[how], call, seconds)
    out = Path(out)
    saved = read_checkpoint(find_checkpoint(out)) if list_checkpoints(out / "checkpoints") else None
    loop.train(recipe(model, data, **settings), out, saved, Display(Console(quiet=True)))


def main():
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401 - which every child would import

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(2, 1)  # what is printed is no answer
                run(**json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(os.waitpid(child, 0)[1], flush=True)
    gc.unfreeze()  # Triton's bindings report as leaks what is frozen at exit


if __name__ == "__main__":
    main()
