"""Weights that stream: a model larger than the device, with its weights and states in host memory or on disk.

``Stream`` has the settings, ``Streamer`` is a fold's traffic between host and device, and ``streamed_bytes`` is the
formula of what crosses the link in a step.
"""

from .blocks import Block, blocks_of
from .config import Stream
from .copies import Copies
from .host import mapped_empty
from .streamer import Streamer, Traffic
from .traffic import streamed_bytes

__all__ = ["Block", "Copies", "Stream", "Streamer", "Traffic", "blocks_of", "mapped_empty", "streamed_bytes"]
