"""What a plan is compared with, traced in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradfold.train.recipe import Recipe

if TYPE_CHECKING:
    from gradfold.plan.step import StepMemory


def trace_peers(recipe: Recipe, settled: frozenset[str], measured: bool) -> tuple[StepMemory, ...]:
    """Steps of the same batches with plain AdamW and its kin; runs in a second process, hence the arguments."""
    from gradfold.cli.flags import quiet_environment
    from gradfold.cli.plan import device_of, settings_from

    quiet_environment()

    from gradfold.plan.fake import frozen_objects
    from gradfold.plan.models import find_subject
    from gradfold.plan.peers import PEERS, peers_of
    from gradfold.plan.predict import predict_peer

    settings, device = settings_from(recipe, settled), device_of(recipe, measured)
    subject = find_subject(recipe.model)
    with frozen_objects():
        return tuple(predict_peer(subject, settings, PEERS[name], name, device) for name in peers_of(settings))
