"""FSDP2, whose hooks step the shards, against torch's AdamW on one process in fp64."""

import contextlib
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradfold
from tests.dist.test_tensor_parallel import parallel
from tests.dist.tiny import HYPER, alone, batch, furthest, loss_of, tiny, whole


def sharded(model, mesh, **options):
    """Shard each layer of a Tiny by itself, and the rest together, as torch's tutorial does."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def mesh_of(*shape, names=("copies", "parts")):
    from torch.distributed.device_mesh import init_device_mesh

    shape = shape or (dist.get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])


def part(tensors, at=None, of=None):
    """Return this rank's share of the rows of each tensor; FSDP2 takes the mean over the ranks."""
    at, of = dist.get_rank() if at is None else at, of or dist.get_world_size()
    return [tensor.chunk(of)[at] for tensor in tensors]


def folded(mesh=None, make=tiny, prepare=None, shard=None, groups=None, optim=None, **options):
    """Return a sharded Tiny, its optimizer and its fold.

    Args:
        mesh: a shape.
        make: makes the model.
        prepare: changes the model before it is sharded.
        shard: options of ``fully_shard``.
        groups: makes param_groups of the named parameters.
        optim: options of the optimizer.
        **options: of ``gradfold.fold``.
    """
    model = make()
    if prepare is not None:
        prepare(model)
    model = sharded(model, mesh_of(*(mesh or ())), **(shard or {}))
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    optimizer = gradfold.AdamW(named if groups is None else groups(named), **HYPER, **(optim or {}))
    return model, optimizer, gradfold.fold(model, optimizer, **options)


def backward(model, step, micro=0, accumulate=1, scale=1.0):
    ids, labels = part(batch(step, micro))
    loss = loss_of(model(ids), labels) * (scale / accumulate)
    loss.backward()
    return loss


def close(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def shards(model):
    return {name: param.to_local().detach().clone() for name, param in model.named_parameters()}


def moved(model, before):
    """Return the names of parameters whose shard on this rank is another one now."""
    for module in model.modules():  # some are gathered, where a backward has raised
        getattr(module, "reshard", lambda: None)()
    return [name for name, shard in shards(model).items() if not torch.equal(shard, before[name])]


# as on one process ----------------------------------------------------------------------------------------------------


def train(accumulate=1, clip=None, summed="fold", tiny_options=None, prepare=None, **options):
    """Return the largest differences of weights and norms to one process, and which parameters keep a ``.grad``.

    Args:
        accumulate: how many micro-batches a step sums.
        clip: the largest norm.
        summed: how: "fold" by ``fold(accumulate=)``, "context" by ``fold.accumulating()``, both of which reduce each
            micro-batch; "no_sync" by FSDP2, which reduces the last; "all_reduce" by HSDP, which scatters each.
        tiny_options: of the Tiny.
        prepare: changes the model before it is sharded.
        **options: as for ``folded``.
    """
    tiny_options = tiny_options or {}
    reference, norms = alone(3, accumulate, clip, prepare, **tiny_options)
    own = accumulate if summed == "fold" else 1
    model, optimizer, fold = folded(
        make=lambda: tiny(**tiny_options), prepare=prepare, accumulate=own, clip_norm=clip, **options
    )
    differences = []
    for step in range(3):
        for micro in range(accumulate):
            last = micro == accumulate - 1
            if summed == "no_sync":
                model.set_requires_gradient_sync(last)
            if summed == "all_reduce":
                model.set_requires_all_reduce(last)
            with fold.accumulating() if summed == "context" and not last else contextlib.nullcontext():
                backward(model, step, micro, accumulate)
        close(optimizer)
        differences.append(abs(fold.grad_norm - norms[step]))
    left = [name for name, param in model.named_parameters() if param.grad is not None]
    fold.remove()
    return furthest(model, reference), max(differences), left


def several(cases):
    return [train(**case) for case in cases]


def check(answers):
    for rank in answers:
        for weights, norms, left in rank:
            assert weights <= 1e-11
            assert norms <= 1e-12
            assert not left


def freeze(model):
    model.embed.weight.requires_grad_(False)
    for param in model.layers["0"].parameters():
        param.requires_grad_(False)


WAYS = [
    {"shard": {"reshard_after_forward": reshard}, "accumulate": accumulate, "clip": clip, "summed": summed}
    for reshard in (True, False)
    for accumulate, clip, summed in (
        (1, None, "fold"),
        (1, 0.05, "fold"),
        (2, 0.05, "fold"),
        (3, None, "fold"),
        (2, 0.05, "no_sync"),
        (2, None, "no_sync"),
        (3, None, "context"),
        (2, 0.05, "context"),
    )
]


def test_as_on_one_process(two):
    check(two.run(several, [WAYS[1], WAYS[2], WAYS[12]]))  # and every way is among the slow ones


@pytest.mark.slow
def test_as_on_one_process_each_way(two, four):
    for world in (two, four):
        check(world.run(several, WAYS, timeout_s=600.0))


MODELS = {
    "tied": {"tiny_options": {"tied": True}, "clip": 0.05, "accumulate": 2},
    "frozen": {"prepare": freeze},
    "no biases": {"tiny_options": {"bias": False}},
    "checkpointed": {"tiny_options": {"checkpoint": False}, "clip": 0.05},
    "reentrant": {"tiny_options": {"checkpoint": True}},
    "copies alone": {"mesh": (2, 1), "clip": 0.05},
    "copies of parts": {"mesh": (1, 2), "accumulate": 2},
    "deferred": {"clip": 0.05, "timing": "deferred"},
}


def test_models_and_meshes(two):
    check(two.run(several, [MODELS[name] for name in ("tied", "frozen", "reentrant", "copies alone")]))


@pytest.mark.slow
def test_models_and_meshes_each(two, four):
    check(two.run(several, list(MODELS.values()), timeout_s=600.0))
    more = [case for name, case in MODELS.items() if "mesh" not in case]
    more += [
        {
            "tiny_options": {"checkpoint": kept},
            "clip": clip,
            "accumulate": accumulate,
            "shard": {"reshard_after_forward": reshard},
        }
        for kept in (True, False)
        for reshard in (True, False)
        for clip, accumulate in ((None, 1), (0.05, 2))
    ]
    check(four.run(several, more, timeout_s=600.0))


@pytest.mark.slow
def test_copies_of_parts(four):
    ways = [(1, 0.05, "fold"), (2, None, "fold"), (2, 0.05, "all_reduce"), (2, None, "no_sync"), (3, 0.05, "context")]
    check(four.run(several, [{"mesh": (2, 2), "accumulate": n, "clip": clip, "summed": way} for n, clip, way in ways]))


@pytest.mark.slow
def test_gathered_again_from_fewer_ranks(four):
    ways = [{"accumulate": 2, "clip": 0.05}, {"accumulate": 2, "summed": "no_sync"}, {}]
    check(four.run(several, [{**way, "shard": {"reshard_after_forward": 2}} for way in ways]))


# policies -------------------------------------------------------------------------------------------------------------


def mixed(ours, dtype, reduce, clip, accumulate):
    """Return the weights after three steps under bf16 compute, and the norms."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
    norms = []
    if ours:
        model, optimizer, fold = folded(
            make=lambda: tiny(dtype), shard={"mp_policy": policy}, clip_norm=clip, accumulate=accumulate
        )
    else:
        model = sharded(tiny(dtype), mesh_of(), mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), **HYPER, fused=True)
    for step in range(3):
        for micro in range(accumulate):
            backward(model, step, micro, accumulate)
        if not ours:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
            norms.append(float(whole(norm)))
        close(optimizer)
        if ours:
            norms.append(fold.grad_norm)
    return [whole(param.detach()) for param in model.parameters()], norms


def differ(*policy):
    """Return how many elements differ from torch's fused AdamW under the same FSDP2, and the largest norms' ratio."""
    weights, norms = mixed(True, *policy)
    theirs, wanted = mixed(False, *policy)
    off = max(abs(mine / norm - 1) for mine, norm in zip(norms, wanted, strict=True))
    return sum(int((a != b).sum()) for a, b in zip(weights, theirs, strict=True)), off


def policies(cases):
    return [differ(*case) for case in cases]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([(torch.float32, torch.float32, None, 1), (torch.float32, None, None, 2)], id="few"),
        pytest.param(
            [
                (dtype, reduce, None, accumulate)
                for dtype in (torch.float32, torch.bfloat16)
                for reduce in (torch.float32, torch.bfloat16, None)
                for accumulate in (1, 2)
                if dtype == torch.float32 or accumulate == 1  # of 16-bit gradients ours are summed in fp32
            ],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_mixed_precision_has_the_bits_of_torchs_fused_kernel(two, cases):
    for rank in two.run(policies, cases):
        for (dtype, *_), (different, norms) in zip(cases, rank, strict=True):
            assert different == 0
            assert norms < (1e-5 if dtype == torch.float32 else 1e-2)  # torch's is of 16 bits, as the gradients are


def offloaded():
    from torch.distributed.fsdp import CPUOffloadPolicy

    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    return [train(shard=policy, accumulate=2, clip=0.05)]


def test_parameters_that_stay_on_the_host(two):
    check(two.run(offloaded))


# uneven shards --------------------------------------------------------------------------------------------------------


def rows_of(step, at=None):
    """Return data of which each rank has another number of rows."""
    random = torch.Generator().manual_seed(step)
    x, y = (torch.randn(10, width, generator=random, dtype=torch.float64) for width in (7, 2))
    if at is None:
        return x, y
    cut = [0, 4, 5, 9, 10] if dist.get_world_size() == 4 else [0, 7, 10]
    return x[cut[at] : cut[at + 1]], y[cut[at] : cut[at + 1]]


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 1), nn.Linear(1, 2)).double()


def uneven(clip, **options):
    from torch.distributed.fsdp import fully_shard

    reference, norms = net(), []
    theirs = torch.optim.AdamW(reference.parameters(), **HYPER)
    model = fully_shard(net(), mesh=mesh_of())
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, clip_norm=clip, **options)
    for step in range(3):
        for module, (x, y), times in (
            (reference, rows_of(step), 1),
            (model, rows_of(step, dist.get_rank()), dist.get_world_size()),
        ):
            ((module(x) - y) ** 2).sum().div(10).mul(times).backward()
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), clip or math.inf)))
        close(theirs)
        close(optimizer)
        norms[-1] -= fold.grad_norm
    return furthest(model, reference), max(map(abs, norms)), [param.to_local().shape[0] for param in model.parameters()]


def unevens():
    return [uneven(None), uneven(0.05)]


def check_uneven(answers, sizes):
    for rank, answer in enumerate(answers):
        for weights, norms, rows in answer:
            assert weights <= 1e-14
            assert norms <= 1e-14
            assert rows == sizes[rank]


def test_uneven_and_empty_shards(two):
    check_uneven(two.run(unevens), [[5, 5, 1, 1, 1, 1], [4, 4, 0, 0, 1, 1]])


@pytest.mark.slow
def test_uneven_and_empty_shards_of_four(four):
    check_uneven(four.run(unevens), [[3, 3, 1, 1, 1, 1], [3, 3, 0, 0, 1, 1], [3, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


# with tensor parallelism ----------------------------------------------------------------------------------------------


def crossed(cases):
    """Train on a mesh of data-parallel rows and tensor-parallel columns."""
    from torch.distributed.tensor.parallel import loss_parallel

    mesh, found = mesh_of(2, 2, names=("dp", "tp")), []
    for sequence, accumulate, clip in cases:
        reference, norms = alone(3, accumulate, clip)
        model = sharded(parallel(tiny(), mesh["tp"], sequence), mesh["dp"])
        optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
        fold = gradfold.fold(model, optimizer, clip_norm=clip, accumulate=accumulate, head="plain")
        for step in range(3):
            for micro in range(accumulate):
                ids, labels = part(batch(step, micro), mesh["dp"].get_local_rank(), 2)
                with loss_parallel():
                    (loss_of(model(ids), labels) / accumulate).backward()
            close(optimizer)
            norms[step] -= fold.grad_norm
        fold.remove()
        found.append((furthest(model, reference), max(map(abs, norms)), []))
    return found


@pytest.mark.slow
def test_over_tensor_parallelism(four):
    check(four.run(crossed, [(sp, n, clip) for sp in (True, False) for n, clip in ((1, None), (1, 0.05), (2, 0.05))]))


def numbered(rows, columns):
    """Compare where ``Shard`` places the elements of a Linear with where they are: each weight is its own number."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from gradfold.engine import Shard

    mesh, wrong, kinds = mesh_of(2, 2, names=("dp", "tp")), [], set()
    for style in (ColwiseParallel, RowwiseParallel):
        model = nn.Sequential(nn.Linear(columns, rows, dtype=torch.float64))
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.arange(param.numel()).view_as(param))
        parallelize_module(model, mesh["tp"], {"0": style()})
        for name, param in fully_shard(model, mesh=mesh["dp"]).named_parameters():
            shard = Shard(name, param)
            kinds.add(type(shard.placements[0]).__name__)
            first, stride = (0, columns) if shard.place is None else (shard.place.offset, shard.place.stride)
            held = shard.held
            there = first + torch.arange(held.shape[0]).mul(stride if held.dim() == 2 else 1).double()
            if held.dim() == 2:
                there = there[:, None] + torch.arange(held.shape[1])
            if not torch.equal(there, held) or not torch.equal(
                whole(param.detach()).flatten(), torch.arange(param.numel()).double()
            ):
                wrong.append((style.__name__, name, shard.placements, held, there))
    return wrong, kinds


def numbers(shapes):
    return [numbered(*shape) for shape in shapes]


@pytest.mark.slow
def test_where_the_elements_of_a_strided_shard_lie(four):
    for rank in four.run(numbers, [(8, 6), (10, 6), (9, 7), (5, 3), (3, 5), (1, 4)], log=False):  # unequal shards
        for wrong, kinds in rank:
            assert not wrong
            assert kinds == {"_StridedShard", "Shard"}


# clipping -------------------------------------------------------------------------------------------------------------


def by_group(named):
    return [
        {"params": [(name, param) for name, param in named if "norm" in name], "clip_norm": 0.01, "weight_decay": 0.0},
        {"params": [(name, param) for name, param in named if "norm" not in name]},
    ]


def clipped(how, **options):
    """Train with torch on one process and with a sharded fold, both clipped by 0.05 as ``how`` says."""
    reference, norm = tiny(), None
    groups = None
    named = list(reference.named_parameters())
    own = [param for name, param in named if "norm" in name] if how == "groups" else []
    rest = [param for name, param in named if not own or "norm" not in name]
    theirs = torch.optim.AdamW([{"params": own, "weight_decay": 0.0}, {"params": rest}], **HYPER)
    if how == "groups":
        groups = by_group
    kind = how if how in ("two_pass", "delayed") else "exact"
    limit = None if how == "call" else 0.05
    model, optimizer, fold = folded(groups=groups, clip_norm=limit, clip=kind, **options)
    off = []
    for step in range(3):
        ids, labels = batch(step)
        loss_of(reference(ids), labels).backward()
        if own:
            nn.utils.clip_grad_norm_(own, 0.01)
        found = nn.utils.get_total_norm([param.grad for param in rest])
        nn.utils.clip_grads_with_norm_(
            rest, 0.05, found if kind == "exact" or kind == "two_pass" else norm or found * 0
        )
        close(theirs)
        norm = found
        ids, labels = part(batch(step))
        loss = loss_of(model(ids), labels)
        fold.backward(loss)
        if how == "torch":
            off.append(abs(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05) - found)))
        if how == "call":
            off.append(abs(float(fold.clip_grad_norm_(0.05) - found)))
        close(optimizer)
        if not own:
            off.append(abs(fold.grad_norm - float(found)))
    return furthest(model, reference), max(off, default=0.0), []


def clips():
    return [
        clipped("groups"),
        clipped("two_pass"),
        clipped("delayed"),
        clipped("torch"),
        clipped("call", timing="deferred"),
    ]


def test_clipped_in_every_way(two):
    check(two.run(clips))


# gradients that are not finite, and divided ---------------------------------------------------------------------------


def not_finite(**options):
    """Let the gradient of rank 1's loss be NaN; return what was said, what has moved, and whether training goes on."""
    model, optimizer, fold = folded(**options)
    before, said = shards(model), ""
    backward(model, 0, scale=math.nan if dist.get_rank() else 1.0)
    try:
        optimizer.step()
    except gradfold.FoldError as error:
        said = str(error)
    still = moved(model, before)
    optimizer.zero_grad()
    backward(model, 1)
    close(optimizer)
    return said, still, fold.grad_norm, all(bool(shard.isfinite().all()) for shard in shards(model).values())


def each_not_finite():
    return [not_finite(), not_finite(on_nonfinite="skip"), not_finite(timing="deferred"), not_finite(clip_norm=1.0)]


def test_a_gradient_that_is_not_finite_on_one_rank(two):
    for rank in two.run(each_not_finite):
        for way, (said, still, norm, finite) in enumerate(rank):
            assert bool(said) == (way != 1)
            assert not still and finite
            assert norm > 0


def divided():
    reference, _ = alone(3)
    model, optimizer, _ = folded()
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
    for step in range(3):
        backward(model, step, scale=1 / dist.get_world_size())
        close(optimizer)
    return furthest(model, reference)


def test_a_divide_factor_of_ones_own(two):
    assert max(two.run(divided)) <= 1e-11


# what is alive --------------------------------------------------------------------------------------------------------


def alive(accumulate, **options):
    """Return the most bytes of sharded gradients alive at once, of the largest group, of all, and those left over."""
    from gradfold.engine import FoldParam

    model, optimizer, _ = folded(accumulate=accumulate, **options)
    bytes_of = {name: shard.nbytes for name, shard in shards(model).items()}
    groups = [[], *([] for _ in model.layers)]
    for name in bytes_of:
        groups[1 + int(name.split(".")[1]) if name.startswith("layers") else 0].append(bytes_of[name])
    seen, most, join = {}, 0, FoldParam.join

    def watch(param):
        nonlocal most
        storage = param.param.grad.to_local().untyped_storage()
        seen[storage.data_ptr()] = weakref.ref(storage), storage.nbytes()
        del storage
        most = max(most, sum(size for ref, size in seen.values() if ref() is not None))
        join(param)

    FoldParam.join = watch
    try:
        for micro in range(accumulate):
            backward(model, 0, micro)
        left = sum(size for ref, size in seen.values() if ref() is not None)
        close(optimizer)
    finally:
        FoldParam.join = join
    return most, max(map(sum, groups)), sum(bytes_of.values()), left


def each_alive():
    return [alive(1), alive(1, make=lambda: tiny(checkpoint=False)), alive(2)]


def test_gradients_of_one_group_are_alive(two):
    for once, checkpointed, twice in two.run(each_alive):
        for most, largest, _, left in (once, checkpointed):
            assert most <= largest
            assert left == 0
        most, largest, all_of_them, _ = twice
        assert most <= all_of_them + largest  # those that wait for the second micro-batch, and its own


# refused, and between steps -------------------------------------------------------------------------------------------


def second_backward():
    model, _, _ = folded()
    backward(model, 0)
    before = shards(model)
    with pytest.raises(
        gradfold.FoldError, match="a second backward reached this weight before .*it has already stepped"
    ):
        backward(model, 1)
    return not moved(model, before)


def a_hook():
    model, _, _ = folded()
    model.head.weight.register_post_accumulate_grad_hook(lambda _: None)
    before = shards(model)
    with pytest.raises(gradfold.FoldError, match="head.weight: a hook registered on this tensor"):
        backward(model, 0)
    return not moved(model, before)


def in_forward():
    model = sharded(tiny(), mesh_of())
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    model.norm.register_forward_hook(lambda *_: gradfold.fold(model, optimizer))
    with pytest.raises(gradfold.FoldError, match="inside a forward or backward of a model under fully_shard"):
        backward(model, 0)
    return True


def not_managed(way):
    from torch.distributed.fsdp import fully_shard

    model = tiny()
    if way == "layers":
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh_of())
    else:
        fully_shard(model, mesh=mesh_of(), ignored_params={model.norm.weight})
    name = {"layers": "embed", "ignored": "norm"}[way]
    with pytest.raises(gradfold.FoldError, match=rf"{name}.weight: .*nothing sums its gradient over the ranks"):
        gradfold.fold(model, gradfold.AdamW(model.named_parameters(), **HYPER))
    for param in model.parameters():  # nothing of it trains
        if not hasattr(param, "placements"):
            param.requires_grad_(False)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    gradfold.fold(model, gradfold.AdamW(named, **HYPER))
    return True


def order():
    model = tiny()
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, group=dist.group.WORLD) if dist.get_world_size() == 1 else None
    fold = fold or gradfold.fold(model, optimizer, group="alone")
    sharded(model, mesh_of())
    with pytest.raises(gradfold.FoldError, match=r"fold\.remove\(\), fully_shard, then make the optimizer and fold"):
        backward(model, 0)
    fold.remove()
    model = sharded(tiny(), mesh_of())
    with pytest.raises(gradfold.FoldError, match="optimizer= is of another model.*FSDP"):
        gradfold.fold(model, optimizer)
    return True


def refused():
    return [second_backward(), a_hook(), in_forward(), not_managed("layers"), not_managed("ignored"), order()]


def test_refused_before_anything_moves(two):
    assert all(map(all, two.run(refused)))


def while_gathered(way):
    """Fold, ask, pause and clear while an evaluation has left the outermost module gathered."""
    reference, _ = alone(3)
    model = sharded(tiny(), mesh_of(), reshard_after_forward=False)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    ids, _ = part(batch(7))
    with torch.no_grad():
        model(ids)
    assert not hasattr(model.head.weight, "placements")
    fold = gradfold.fold(model, optimizer, timing="deferred" if way == "cleared" else "auto")
    for step in range(3):
        if way == "evaluated":
            with torch.no_grad():
                model(ids)
            assert {row.route for row in fold.report().rows} == {"hooked"}
            model.zero_grad()
        if way == "cleared":
            backward(model, 10 + step)
            with torch.no_grad():
                model(ids)
            model.zero_grad()
        with fold.paused() if way == "paused" and step == 1 else contextlib.nullcontext():
            backward(model, step)
            if way == "evaluated":
                with torch.no_grad():
                    model(ids)
            close(optimizer)
    model.reshard()
    for layer in model.layers.values():
        layer.reshard()
    return furthest(model, reference)


def each_gathered():
    return [while_gathered(way) for way in ("evaluated", "cleared", "paused")]


def test_while_modules_are_gathered(two):
    for rank in two.run(each_gathered):
        assert max(rank) <= 1e-11
