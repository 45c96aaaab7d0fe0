"""Training on many ranks, on torch's own DTensor, FSDP2, pipelines and process groups."""

from .fsdp import Sharding, sharding_of
from .ranks import ALONE, Ranks, ranks_of
from .replicas import Replicas, message_bytes, replicas_of, replicate
from .shards import shard_reducer
from .spread import spread
from .stages import Stages

__all__ = [
    "ALONE",
    "Ranks",
    "Replicas",
    "Sharding",
    "Stages",
    "message_bytes",
    "ranks_of",
    "replicas_of",
    "replicate",
    "shard_reducer",
    "sharding_of",
    "spread",
]
