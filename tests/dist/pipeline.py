"""Stages of a Tiny, their schedules, and what one training on them gives."""

import torch
import torch.distributed as dist

import gradfold
from tests.dist.tiny import HYPER, LAYERS, alone, batch, furthest, loss_of, tiny

MICRO = 4  # micro-batches
V_SHAPED = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")  # these have the last stage on the first rank


def stage_module(model, number, count):
    """Cut a Tiny in place down to one of ``count`` stages; layers keep their names."""
    layers = len(model.layers) // count
    for name in list(model.layers):
        if int(name) // layers != number:
            del model.layers[name]
    if number > 0:
        model.embed = None
    if number < count - 1:
        model.norm = model.head = None
    return model


def numbers_of(kind, rank, size, count):
    """Return which stages a rank has."""
    if kind in V_SHAPED:
        return [rank, 2 * size - 1 - rank]
    return list(range(rank, count, size))


def pipeline(kind, count, scale_grads=True, micro=MICRO, **options):
    """Return the modules of this rank's stages by number, and their schedule."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    rank, size = dist.get_rank(), dist.get_world_size()
    mine = numbers_of(kind, rank, size, count)
    modules = {number: stage_module(tiny(layers=max(LAYERS, count), **options), number, count) for number in mine}
    stages = [pipelining.PipelineStage(module, n, count, torch.device("cpu")) for n, module in modules.items()]
    made = getattr(schedules, kind)
    several = issubclass(made, schedules.PipelineScheduleMulti)
    divisor = 1 if scale_grads else micro
    schedule = made(
        stages if several else stages[0],
        micro,
        loss_fn=lambda logits, labels: loss_of(logits, labels) / divisor,
        scale_grads=scale_grads,
    )
    return modules, schedule


def run_step(schedule, modules, step, micro=MICRO):
    """Run one step's micro-batches."""
    parts = [batch(step, index) for index in range(micro)]
    ids, labels = (torch.cat(side) for side in zip(*parts))
    first = [ids] if any(module.embed is not None for module in modules.values()) else []
    last = {"target": labels, "losses": []} if any(module.head is not None for module in modules.values()) else {}
    schedule.step(*first, **last)
    return last.get("losses", [])


def optimizer_of(modules, names=True, **options):
    named = [pair for module in modules.values() for pair in module.named_parameters()]
    return gradfold.AdamW(named if names else [param for _, param in named], **{**HYPER, **options})


def furthest_of(modules, reference):
    return max(furthest(module, reference) for module in modules.values())


def train(kind, count, scale_grads, clip, micro=MICRO, steps=3, **options):
    """Return differences of weights and norms from one process, leftovers, and how often a product was computed."""
    reference, norms = alone(steps, micro, clip, layers=max(LAYERS, count))
    modules, schedule = pipeline(kind, count, scale_grads, micro)
    optimizer = optimizer_of(modules)
    fold = gradfold.fold_stage(schedule, optimizer, clip_norm=clip, **options)
    worst = 0.0
    for step in range(steps):
        run_step(schedule, modules, step, micro)
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(fold.grad_norm - norms[step]))
    left = [name for module in modules.values() for name, param in module.named_parameters() if param.grad is not None]
    fold.remove()
    return furthest_of(modules, reference), worst, left
