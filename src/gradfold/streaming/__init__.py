"""Weights that stream: a model larger than the device, with its weights and states in host memory or on disk.

``Stream`` has the settings, ``Traffic`` is what crosses the link in a step, and ``streamed_bytes`` the formula of that.
"""

from .blocks import Block as Block
from .config import Stream
from .copies import Copies as Copies
from .streamer import Streamer as Streamer
from .traffic import Traffic, streamed_bytes

__all__ = ["Stream", "Traffic", "streamed_bytes"]
