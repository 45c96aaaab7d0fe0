"""A world of processes that runs functions on all of its ranks, and fails instead of hanging.

The processes live as long as the test session, since importing torch takes longer than most cases. They talk over gloo
on 127.0.0.1 with one thread each. A case that takes too long, or leaves the ranks out of step, ends its world; the next
case gets a new one.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import multiprocessing
import os
import socket
import time
import traceback

TIMEOUT_S = 120.0  # of a case: what takes longer hangs
COLLECTIVE_TIMEOUT_S = 60.0


class RankError(AssertionError):
    """What went wrong on the ranks of a case."""


class World:
    """``size`` processes, started with the first case."""

    def __init__(self, size, method="spawn"):
        self.size, self.method = size, method  # "fork" starts at once, and is for worlds that are to die
        self.workers, self.pipes = [], []

    def start(self):
        if self.workers:
            return
        context = multiprocessing.get_context(self.method)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=True)
            worker.start()
            theirs.close()
            self.workers.append(worker)
            self.pipes.append(mine)

    def run(self, function, *args, timeout_s=TIMEOUT_S, log=True, alike=None):
        """Return what ``function(*args)`` returned on each rank.

        Args:
            function: of a module that can be imported; the process group is the default one.
            args: what can be pickled.
            timeout_s: for all ranks together.
            log: compare the collectives of ranks: operation, shapes, order.
            alike: groups of ranks that are compared with the first of their group; None compares all ranks.

        Raises:
            RankError: a rank raised, was too slow, died, or used other collectives than the one it is compared with.
        """
        self.start()
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, args, log))
        end, answers = time.monotonic() + timeout_s, []
        for rank, pipe in enumerate(self.pipes):
            try:
                answers.append(pipe.recv() if pipe.poll(max(end - time.monotonic(), 0.0)) else (False, "too slow", []))
            except EOFError:
                answers.append((False, f"the process is gone, exit code {self.workers[rank].exitcode}", []))
        if not all(ok for ok, _, _ in answers):
            self.stop()
            said = [f"rank {rank}: {what}" for rank, (ok, what, _) in enumerate(answers) if not ok]
            raise RankError("\n".join(said))
        logs = [log for _, _, log in answers]
        for first, *others in alike or [range(self.size)]:
            for rank in others:
                ours, theirs = logs[first], logs[rank]
                if theirs != ours:
                    differ = (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
                    at = next(differ, min(len(ours), len(theirs)))
                    raise RankError(
                        f"collective {at}: {ours[at : at + 1]} on rank {first}, {theirs[at : at + 1]} on rank {rank}"
                    )
        return [found for _, found, _ in answers]

    def stop(self):
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join()
        for pipe in self.pipes:
            pipe.close()
        self.workers, self.pipes = [], []


def _serve(pipe, rank, size, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank)
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            module, name, args, log = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            function = getattr(importlib.import_module(module), name)
            with collectives() if log else contextlib.nullcontext([]) as seen:
                found = function(*args)
            pipe.send((True, found, seen))
        except BaseException:
            pipe.send((False, traceback.format_exc(), []))
        gc.collect()


@contextlib.contextmanager
def collectives():
    """A context that yields a list of all collectives: operation, shapes of the tensors."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            space, _, name = str(function).partition(".")
            if (
                space in ("c10d", "_c10d_functional")
                and "wait_tensor" not in name
                and "send" not in name
                and "recv" not in name
            ):
                tensors = [t for t in tree_flatten(args)[0] if isinstance(t, torch.Tensor)]
                if name.startswith(("scatter", "gather")):
                    tensors = tensors[:1]  # only one rank has the others
                seen.append((f"{space}.{name}", [tuple(t.shape) for t in tensors]))
            return function(*args, **(kwargs or {}))

    with Log():
        yield seen
