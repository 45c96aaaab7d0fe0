"""Tensor and sequence parallelism, against torch's AdamW on one process in fp64."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradfold
from tests.dist.tiny import HYPER, VOCABULARY, WIDTH, alone, batch, furthest, loss_of, tiny
from tests.dist.world import collectives


def parallel(model, mesh, sequence):
    """Cut a Tiny over a mesh, as torch's own tutorials do; what is tied stays tied."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    tied = model.head.weight is model.embed.weight
    tokens = Shard(1)
    between = {"output_layouts": tokens} if sequence else {}
    plan: dict = {
        "embed": RowwiseParallel(input_layouts=Replicate(), **between),
        "head": ColwiseParallel(
            **({"input_layouts": tokens} if sequence else {}), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    inside: dict = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    inside |= {"inner.gate": ColwiseParallel(), "inner.up": ColwiseParallel()}
    inside |= {"attention.o": RowwiseParallel(**between), "inner.down": RowwiseParallel(**between)}
    if sequence:
        plan["norm"] = SequenceParallel()
        inside |= {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
        gather = {"input_layouts": (tokens,), "desired_input_layouts": (Replicate(),)}
        inside |= {"attention": PrepareModuleInput(**gather), "inner": PrepareModuleInput(**gather)}
    parallelize_module(model, mesh, plan)
    for layer in model.layers.values():
        parallelize_module(layer, mesh, inside)
    if tied:
        model.head.weight = model.embed.weight
    return model


def mesh_of_all():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


class Case(NamedTuple):
    """One way to train; ``model`` are options of ``tiny``."""

    sequence: bool = False
    accumulate: int = 1
    clip: float | None = None
    timing: str = "auto"
    frozen: tuple[str, ...] = ()  # names of parameters, or parts of them
    model: dict = {}
    folded: int = 16  # how many parameters modules hand terms of
    limit: float = 1e-11  # of the weights' distance from one process


TIED = {"folded": 15, "limit": 1e-10}  # torch's own tensor parallelism is 2e-11 away: sums in another order
FROZEN = ("embed", "attention.k", "norm1", "0.inner.down")
CASES = {
    "tp": Case(),
    "sp": Case(sequence=True, accumulate=2, clip=0.05),
    "sp, tied, checkpoints": Case(sequence=True, model={"tied": True, "checkpoint": False}, **TIED),
    "tp, frozen, no bias, reentrant": Case(
        frozen=FROZEN, clip=0.05, folded=12, model={"bias": False, "checkpoint": True}
    ),
    "sp, deferred": Case(sequence=True, timing="deferred", accumulate=2),
}
MORE = {
    f"{'sp' if sequence else 'tp'}, {name}": case._replace(sequence=sequence)
    for sequence in (False, True)
    for name, case in {
        "sum of 3": Case(accumulate=3),
        "clip": Case(clip=0.05),
        "sum of 2, clip": Case(accumulate=2, clip=0.05),
        "checkpoints": Case(model={"checkpoint": False}, accumulate=2),
        "reentrant": Case(model={"checkpoint": True}, accumulate=2),
        "reentrant, clip": Case(model={"checkpoint": True}, clip=0.05),
        "tied": Case(model={"tied": True}, **TIED),
        "tied, reentrant, sum of 2, clip": Case(
            model={"tied": True, "checkpoint": True}, accumulate=2, clip=0.05, **TIED
        ),
        "no bias": Case(model={"bias": False}),
        "frozen": Case(frozen=FROZEN, folded=12, accumulate=2),
        "deferred": Case(timing="deferred"),
    }.items()
}


def freeze(model, names):
    for name, param in model.named_parameters():
        param.requires_grad_(not any(part in name for part in names))


def train(cases):
    """Return for each case: weights' and norms' distance from one process, what is folded, gradients left."""
    from torch.distributed.tensor.parallel import loss_parallel

    mesh, found = mesh_of_all(), {}
    for name, case in cases.items():
        reference, norms = alone(
            3, case.accumulate, case.clip, prepare=lambda model, case=case: freeze(model, case.frozen), **case.model
        )
        model = parallel(tiny(**case.model), mesh, case.sequence)
        freeze(model, case.frozen)
        trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        optimizer = gradfold.AdamW(trained, **HYPER)
        fold = gradfold.fold(
            model, optimizer, accumulate=case.accumulate, clip_norm=case.clip, timing=case.timing, head="plain"
        )
        differences = []
        for step in range(3):
            for micro in range(case.accumulate):
                ids, labels = batch(step, micro)
                with loss_parallel():
                    (loss_of(model(ids), labels) / case.accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            differences.append(abs(fold.grad_norm - norms[step]))
        routes = sum(row.route == "folded" for row in fold.report().rows)
        left = [name for name, param in model.named_parameters() if param.grad is not None]
        fold.remove()
        found[name] = furthest(model, reference), max(differences), routes, left
    return found


def check(found, cases):
    for name, case in cases.items():
        weights, norms, folded, left = found[name]
        assert weights <= case.limit, name
        assert norms <= 1e-12, name
        assert folded == case.folded, name
        assert not left, name


def test_as_on_one_process(two):
    for found in two.run(train, CASES):
        check(found, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("world", ["two", "four"])
def test_more_cases(request, world, name):
    cases = {name: MORE[name]}
    for found in request.getfixturevalue(world).run(train, cases):
        check(found, cases)


@pytest.mark.slow
def test_four_ranks(four):
    for found in four.run(train, CASES):
        check(found, CASES)


# what is sent, and what is stored -------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operators make on this rank."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on this rank's part come next
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor) and not hasattr(one, "fake_mode"):  # DTensor asks for shapes with fakes
                self.seen.add(tuple(one.shape))
        return made


def sent(sequence):
    """Return the collectives of forward and backward, plain and folded, and whether a [V, H] was made in backward."""
    from torch.distributed.tensor.parallel import loss_parallel

    mesh, found = mesh_of_all(), {}
    for folded in (False, True):
        model = parallel(tiny(), mesh, sequence)
        fold = None
        if folded:
            optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
            fold = gradfold.fold(model, optimizer, head="plain")
        ids, labels = batch(0, rows=3)  # 3 x 16 tokens: no activation has the embedding's shape
        with collectives() as log, loss_parallel():
            loss = loss_of(model(ids), labels)
            count = len(log)
            loss.backward()
        shapes = Shapes()
        with loss_parallel():
            if fold is not None:
                optimizer.step()
            loss = loss_of(model(ids), labels)
            with shapes:
                loss.backward()
        if fold is not None:
            optimizer.step()
            fold.remove()
        found[folded] = log[:count], log[count:], (VOCABULARY, WIDTH) in shapes.seen
    return found


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
def test_folding_sends_nothing_more(two, sequence):
    for found in two.run(sent, sequence):
        forward, backward, whole = found[False]
        folded_forward, folded_backward, folded_whole = found[True]
        assert folded_forward == forward
        assert len(backward) > 4
        extra = list(folded_backward)
        for one in backward:
            extra.remove(one)
        # the gradients of five norms, which torch leaves unsummed until its optimizer steps
        norms = [[(5 * WIDTH,)]] if sequence else []
        assert [shapes for name, shapes in extra if "all_reduce" in name] == norms
        assert len(extra) == 2 * len(norms)  # torch notes what wraps the result, too
        assert whole
        assert not folded_whole


# outside of folded backwards ------------------------------------------------------------------------------------------


def around():
    """Folded, paused, folded again, unfolded: DTensor gradients, Partial ones among them, in each."""
    from torch.distributed.tensor.parallel import loss_parallel

    reference, _ = alone(4)
    model = parallel(tiny(), mesh_of_all(), True)
    kept = [type(module) for module in model.modules()]
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, head="plain")
    report = str(fold.report())
    rows = {row.name: (row.weight_bytes, row.state_bytes, row.part) for row in fold.report().rows}
    for step in range(4):
        if step == 3:
            fold.remove()
        ids, labels = batch(step)
        with fold.paused() if step == 1 else contextlib.nullcontext(), loss_parallel():
            loss_of(model(ids), labels).backward()
            written = model.embed.weight.grad is not None
            optimizer.step()
            optimizer.zero_grad()
        assert written == (step in (1, 3))
    plain = [type(module) for module in model.modules()] == kept
    optimizer.zero_grad(set_to_none=True)
    return furthest(model, reference), report, rows, plain


def test_paused_removed_and_report(two):
    for rank, (weights, report, rows, plain) in enumerate(two.run(around)):
        assert weights <= 1e-11
        assert plain
        whole = VOCABULARY * WIDTH * 8
        assert rows["embed.weight"] == (whole // 2, whole + 4, "Shard(dim=0)")  # two states, and the count of steps
        assert rows["norm.weight"][2] == ""
        assert f"rank {rank} of 2: shapes are of whole parameters" in report


def zeros():
    """zero_grad(set_to_none=False): what the next backward does not reach steps with a gradient of zeros."""
    from torch.distributed.tensor.parallel import loss_parallel

    reference, plain = tiny(), None
    plain = torch.optim.AdamW(reference.parameters(), **HYPER)
    model = parallel(tiny(), mesh_of_all(), True)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, head="plain")
    for each, of in ((model, optimizer), (reference, plain)):
        for step in range(2):
            ids, labels = batch(step)
            with loss_parallel() if each is model else contextlib.nullcontext():
                if step == 0:
                    loss_of(each(ids), labels).backward()
                else:
                    each.embed(ids).pow(2).sum().backward()
            of.step()
            of.zero_grad(set_to_none=False)
    fold.remove()
    return furthest(model, reference)


@pytest.mark.slow
def test_gradients_of_zeros(two):
    assert max(two.run(zeros)) <= 1e-11


# 16 bits --------------------------------------------------------------------------------------------------------------


def autocast():
    """Under autocast, compared with torch's tensor parallelism: the same products of the same rounded numbers."""
    from torch.distributed.tensor.parallel import loss_parallel

    mesh, models, start = mesh_of_all(), [], None
    for folded in (False, True):
        model = parallel(tiny(torch.float32), mesh, True)
        start = [p.to_local().detach().clone() for p in model.parameters()]
        kind = gradfold.SGD if folded else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=0.1)
        fold = gradfold.fold(model, optimizer, head="plain") if folded else None
        for step in range(2):
            ids, labels = batch(step)
            with loss_parallel():
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(ids)
                loss_of(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        if fold is not None:
            assert sum(row.route == "folded" for row in fold.report().rows) == 16
            fold.remove()
        models.append([p.to_local().detach().clone() for p in model.parameters()])
    plain, ours, before = (torch.cat([part.flatten() for part in parts]) for parts in (*models, start))
    return float((ours - plain).norm() / (plain - before).norm())


def test_autocast(two):
    assert max(two.run(autocast)) <= 0.02
