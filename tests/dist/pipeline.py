"""Stages of a Tiny, their schedules, and what one training on them gives."""

import itertools
from typing import Any

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


def pipeline(kind, count, scale_grads=True, micro=MICRO, group=None, divisor=None, **options):
    """Return the modules of this rank's stages by number, and their schedule."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = numbers_of(kind, rank, size, count)
    modules = {number: stage_module(tiny(layers=max(LAYERS, count), **options), number, count) for number in mine}
    device = torch.device("cpu")
    stages = [pipelining.PipelineStage(module, n, count, device, group=group) for n, module in modules.items()]
    made = getattr(schedules, kind)
    several = issubclass(made, schedules.PipelineScheduleMulti)
    divisor = divisor or (1 if scale_grads else micro)
    schedule = made(
        stages if several else stages[0],
        micro,
        loss_fn=lambda logits, labels: loss_of(logits, labels) / divisor,
        scale_grads=scale_grads,
    )
    return modules, schedule


def run_step(schedule, modules, step, micro=MICRO, first=0, run=None):
    """Run a step's micro-batches, or those from ``first`` on."""
    parts = [batch(step, index) for index in range(first, first + micro)]
    ids, labels = (torch.cat(side) for side in zip(*parts))
    inputs = [ids] if any(module.embed is not None for module in modules.values()) else []
    last = {"target": labels, "losses": []} if any(module.head is not None for module in modules.values()) else {}
    (run or schedule.step)(*inputs, **last)
    return last.get("losses", [])


def optimizer_of(modules, names=True, **options):
    named = [pair for module in modules.values() for pair in module.named_parameters()]
    return gradfold.AdamW(named if names else [param for _, param in named], **{**HYPER, **options})


def furthest_of(modules, reference):
    return max(furthest(module, reference) for module in modules.values())


def train(kind, count, scale_grads, clip, micro=MICRO, steps=2):
    """Return the differences of weights and norms from one process, and which gradients are left over."""
    reference, norms = alone(steps, micro, clip, layers=max(LAYERS, count))
    modules, schedule = pipeline(kind, count, scale_grads, micro)
    optimizer = optimizer_of(modules)
    fold = gradfold.fold_stage(schedule, optimizer, clip_norm=clip)
    worst = 0.0
    for step in range(steps):
        run_step(schedule, modules, step, micro)
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(fold.grad_norm - norms[step]))
    left = [name for module in modules.values() for name, param in module.named_parameters() if param.grad is not None]
    fold.remove()
    return furthest_of(modules, reference), worst, left


# what is refused, and what is not finite ------------------------------------------------------------------------------


def said(function, *args, **options):
    """Return the message of the FoldError that a call ends in, wherever torch has wrapped it; empty without one."""
    try:
        function(*args, **options)
    except Exception as error:
        found = error
        while found is not None:
            if isinstance(found, gradfold.FoldError):
                return str(found)
            found = found.__cause__
        raise
    return ""


def weights_of(modules):
    return [param.detach().clone() for module in modules.values() for param in module.parameters()]


def moved(modules, before):
    return sum(not torch.equal(a, b) for a, b in zip(weights_of(modules), before, strict=True))


def fold_with(**options):
    return lambda modules, schedule: gradfold.fold_stage(schedule, optimizer_of(modules), **options)


def refusals():
    """Return what each wrong call says, and how many weights have moved by then."""
    found = {}

    def refused(name, call, kind="Schedule1F1B", count=2, prepare=None, **options):
        modules, schedule = pipeline(kind, count, **options)
        before = weights_of(modules)
        if prepare is not None:
            prepare(modules)
        found[name] = said(call, modules, schedule), moved(modules, before)

    refused("no group", lambda modules, schedule: gradfold.fold(modules[dist.get_rank()], optimizer_of(modules)))
    refused("accumulate", fold_with(accumulate=2))
    refused("two_pass", fold_with(clip="two_pass", clip_norm=1.0))
    refused("working_set", fold_with(working_set=gradfold.WorkingSet(chunks=2)))
    refused("joint", fold_with(joint=True))
    refused("alone", fold_with(group="alone"))
    refused("no schedule", lambda modules, schedule: gradfold.fold_stage(modules, optimizer_of(modules)))
    refused("prefix", fold_with(prefix=3))
    refused("a tie that is not there", fold_with(tied={"head.wieght": "embed.wieght"}))
    refused("a tie of different weights", fold_with(tied={"head.weight": "embed.weight"}))
    refused("a tie in host memory", fold_with(tied={"head.weight": "embed.weight"}, tape="host"))
    refused("tied on one rank only", fold_with(tied={"head.weight": "embed.weight"} if dist.get_rank() else None))
    two = "ScheduleInterleaved1F1B", 4
    refused("one stage only", lambda m, s: gradfold.fold_stage(s, optimizer_of(dict(list(m.items())[:1]))), *two)
    several: Any = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])]
    refused("an optimizer for each", lambda modules, schedule: gradfold.fold_stage(schedule, several), *two)

    def rename(modules):
        for module in modules.values():
            module.layers = torch.nn.ModuleDict({"0": next(iter(module.layers.values()))})

    refused("names on two ranks", fold_with(), prepare=rename)
    refused("names on one rank", fold_with(), *two, prepare=rename)
    return found


def late_refusals():
    """Return the same for what is only seen as the schedule runs, of pipelines that each rank has of its own."""
    found, own = {}, dist.new_group([dist.get_rank()], use_local_synchronization=True)

    def refused(name, call, kind="ScheduleGPipe", count=1, **options):
        modules, schedule = pipeline(kind, count, group=own, **options)
        before = weights_of(modules)
        call(modules, schedule)
        found[name] = said(run_step, schedule, modules, 0), moved(modules, before)

    def plainly(accumulate):
        return lambda modules, _: gradfold.fold(modules[0], optimizer_of(modules), accumulate=accumulate, group="alone")

    refused("scale_grads", plainly(MICRO))
    refused("micro-batches", plainly(2), scale_grads=False)

    def change(modules, schedule):
        gradfold.fold_stage(schedule, optimizer_of(modules), group=own)
        schedule.scale_grads = False

    def drop(modules, schedule):
        gradfold.fold_stage(schedule, optimizer_of(modules), group=own)
        for stage in schedule._stages:
            stage.dw_builder = None

    def several(modules, _):
        gradfold.fold(
            torch.nn.ModuleDict({str(n): m for n, m in modules.items()}), optimizer_of(modules), group="alone"
        )

    refused("changed later", change)
    refused("dw_builder", drop, "ScheduleInterleavedZeroBubble", 2)
    refused("several stages", several, "ScheduleInterleaved1F1B", 2)
    modules, schedule = pipeline("ScheduleGPipe", 1, group=own, scale_grads=False)
    plainly(MICRO)(modules, schedule)
    run_step(schedule, modules, 0)  # needs nothing of fold_stage
    return found


class Poison(torch.autograd.Function):
    """The same numbers, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


def not_finite(options):
    """Step with one gradient of the last stage that is not finite; return what the ranks say, and how many moved."""
    modules, schedule = pipeline("Schedule1F1B", 2)
    optimizer = optimizer_of(modules)
    fold = gradfold.fold_stage(schedule, optimizer, **options)
    before = weights_of(modules)
    if 1 in modules:
        norm = modules[1].norm
        norm.forward = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * Poison.apply(norm.weight)
    run_step(schedule, modules, 0)
    message = said(optimizer.step)
    return message, moved(modules, before), len(before), fold.grad_norm


# names, ties, and products --------------------------------------------------------------------------------------------


def sequential(offset, prefix, names):
    """Train two slices of one nn.Sequential in bf16 with random bits; return the largest difference from one."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    def make():
        torch.manual_seed(0)
        sizes = (8, 16, 16, 16, 8)
        return torch.nn.Sequential(*(torch.nn.Linear(m, n) for m, n in itertools.pairwise(sizes))).bfloat16()

    def optimizer_for(params):
        return gradfold.AdamW(params, lr=1e-2, states="int8", small_size=0, rounding="stochastic", master=None)

    random = torch.Generator().manual_seed(5)
    x, y = (torch.randn(8, 8, generator=random).bfloat16() for _ in range(2))
    whole = make()
    optimizer = optimizer_for(whole.named_parameters())
    gradfold.fold(whole, optimizer, group="alone")
    for _ in range(2):
        (whole(x) - y).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    rank = dist.get_rank()
    here = slice(2 * rank, 2 * rank + 2)
    part = torch.nn.Sequential(*list(make())[here])  # a slice of the model would keep its names
    schedule = ScheduleGPipe(
        PipelineStage(part, rank, 2, torch.device("cpu")), 1, loss_fn=lambda out, y: (out - y).square().sum()
    )
    optimizer = optimizer_for(part.named_parameters() if names else part.parameters())
    fold = gradfold.fold_stage(schedule, optimizer, offset=offset, prefix=prefix)
    for _ in range(2):
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y)
        optimizer.step()
        optimizer.zero_grad()
    theirs = dict(torch.nn.Sequential(*list(whole)[here]).named_parameters())
    same = all(torch.equal(param, theirs[name]) for name, param in part.named_parameters())
    return same, [name for name, _ in fold.model.named_parameters()], optimizer.stream_of(next(part.parameters()))


def tie(kind, clip, timing="auto", steps=2):
    """Train a model whose head is its embedding; return differences from one process, and digests of the copies."""
    count = dist.get_world_size() * (1 if kind == "Schedule1F1B" else 2)
    reference, norms = alone(steps, MICRO, clip, layers=max(LAYERS, count), tied=True)
    modules, schedule = pipeline(kind, count, tied=True)
    first, last = 0 in modules, count - 1 in modules
    if first and last:
        modules[count - 1].head.weight = modules[0].embed.weight
    ties = None if kind in V_SHAPED else {"head.weight": "embed.weight"}
    params = dict.fromkeys(param for module in modules.values() for param in module.parameters())
    optimizer = gradfold.AdamW(params, **HYPER)
    fold = gradfold.fold_stage(schedule, optimizer, tied=ties, clip_norm=clip, timing=timing)
    worst = 0.0
    for step in range(steps):
        run_step(schedule, modules, step)
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(fold.grad_norm - norms[step]))
    theirs = dict(reference.named_parameters())
    weights = max(
        float((param - theirs["embed.weight" if name == "head.weight" else name]).detach().abs().max())
        for module in modules.values()
        for name, param in module.named_parameters()
    )
    copy = modules[0].embed.weight if first else modules[count - 1].head.weight if last else None
    return weights, worst, None if copy is None else copy.detach().numpy().tobytes()


def backwards_of_weights(kind, stages):
    """Return how often the weights of Linears were reached in one step, with terms and with dense gradients."""
    modules, schedule = pipeline(kind, dist.get_world_size() * stages)
    optimizer = optimizer_of(modules)
    fold = gradfold.fold_stage(schedule, optimizer)
    run_step(schedule, modules, 0)
    optimizer.step()
    weights = [param for param in fold._state.params.values() if param.folded and param.param.dim() == 2]
    return {param.handed for param in weights}, {param.dense for param in weights}


# beside other things --------------------------------------------------------------------------------------------------


def checkpointed(kind, count):
    """Train stages whose layers are checkpointed."""
    reference, _ = alone(2, MICRO, None, layers=max(LAYERS, count))
    modules, schedule = pipeline(kind, count, checkpoint=False)
    optimizer = optimizer_of(modules)
    gradfold.fold_stage(schedule, optimizer)
    for step in range(2):
        run_step(schedule, modules, step)
        optimizer.step()
        optimizer.zero_grad()
    return furthest_of(modules, reference)


def accumulated(kind, count):
    """Sum two runs of a schedule in each step, with an evaluation between steps."""
    reference, _ = alone(2, 2 * MICRO, None, layers=max(LAYERS, count))
    modules, schedule = pipeline(kind, count, scale_grads=False, divisor=2 * MICRO)
    optimizer = optimizer_of(modules)
    fold = gradfold.fold_stage(schedule, optimizer, accumulate=2)
    for step in range(2):
        for half in range(2):
            run_step(schedule, modules, step, first=half * MICRO)
        optimizer.step()
        optimizer.zero_grad()
        run_step(schedule, modules, step, run=schedule.eval)
    return furthest_of(modules, reference), fold.options.accumulate


def beside_tensor_parallelism(clip):
    """Train two stages, each on two ranks by tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    number = mesh.get_local_rank("pp")
    module = stage_module(tiny(), number, 2)
    columns, rows = ColwiseParallel, RowwiseParallel
    plan = {f"attention.{name}": columns() for name in "qkv"} | {"inner.gate": columns(), "inner.up": columns()}
    for layer in module.layers.values():
        parallelize_module(layer, mesh["tp"], {**plan, "attention.o": rows(), "inner.down": rows()})
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = Schedule1F1B(stage, MICRO, loss_fn=loss_of)
    reference, norms = alone(2, MICRO, clip)
    optimizer = optimizer_of({number: module})
    fold = gradfold.fold_stage(schedule, optimizer, clip_norm=clip)
    worst = 0.0
    for step in range(2):
        run_step(schedule, {number: module}, step)
        optimizer.step()
        optimizer.zero_grad()
        worst = max(worst, abs(fold.grad_norm - norms[step]))
    return furthest(module, reference), worst


def names_beside_tensor_parallelism():
    """Return what two stages of the same names say where each is on two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    number = mesh.get_local_rank("pp")
    module = parallelize_module(torch.nn.Linear(4, 4), mesh["tp"], ColwiseParallel())
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = Schedule1F1B(stage, MICRO, loss_fn=loss_of)
    return said(gradfold.fold_stage, schedule, gradfold.AdamW(module.named_parameters()))
