"""One rank of several, of which the others are not there: collectives that return at once, for plans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gradfold._torch import fake_store, without_modes

from .errors import PlanError


@contextlib.contextmanager
def standing_for(ranks: int) -> Iterator[Any]:
    """A context in which this process is the first of ``ranks``, by torch's own stand-in for a process group.

    Its collectives move nothing. On fake tensors that is all there is to see: shapes, and memory.

    Args:
        ranks: how many ranks.

    Yields:
        Their device mesh, with one dimension.

    Raises:
        PlanError: this process is one of several real ones.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    if distributed.is_initialized():
        raise PlanError(
            f"ranks={ranks}: this process has joined a process group already; plan in a process of its own, without "
            "torchrun"
        )
    with without_modes():  # a mesh is a table of real numbers
        distributed.init_process_group("fake", store=fake_store(), rank=0, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
    try:
        yield mesh
    finally:
        distributed.destroy_process_group()
