"""What crosses the link between host and device: counted, and by formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class Traffic:
    """Bytes over the link in one step.

    Attributes:
        weights_to_device: weights of blocks that were fetched.
        weights_to_host: weights that have changed and went back.
        states_to_device: states that came for their weights' steps.
        states_to_host: states that have changed and went back.
        seconds_waited: how long the host waited for copies.

    Example:
        >>> fold = gradfold.fold(model, optimizer, stream=gradfold.Stream())
        >>> fold.traffic.to_device  # bytes, in the last step
        0
    """

    weights_to_device: int = 0
    weights_to_host: int = 0
    states_to_device: int = 0
    states_to_host: int = 0
    seconds_waited: float = 0.0

    @property
    def to_device(self) -> int:
        """All bytes to the device."""
        return self.weights_to_device + self.states_to_device

    @property
    def to_host(self) -> int:
        """All bytes to the host."""
        return self.weights_to_host + self.states_to_host


def streamed_bytes(block_bytes: Sequence[int], state_bytes: int, blocks: int) -> Traffic:
    """Return what crosses the link in a step of one backward in which every weight steps.

    All blocks come for their forward, and again for their backward, but for the last ones, which are still there. What
    has stepped goes back, and every state comes and goes once.

    Args:
        block_bytes: bytes of each block's weights, in the order in which they run.
        state_bytes: bytes of all states that stream.
        blocks: how many blocks the device holds.

    Returns:
        The bytes; ``seconds_waited`` is 0.

    Example:
        >>> gradfold.streaming.streamed_bytes([100, 100, 100], state_bytes=800, blocks=2).to_device
        1200
    """
    stay = min(blocks, len(block_bytes))
    again = sum(block_bytes[: len(block_bytes) - stay])
    return Traffic(sum(block_bytes) + again, sum(block_bytes), state_bytes, state_bytes)
