"""torch's private names stand in one file, and each of them is what that file says."""

import copy
import inspect
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import gradfold
from gradfold import _torch
from gradfold.engine.gate import hook_fires_without_gradient
from gradfold.engine.segments import watch

SOURCES = Path(gradfold.__file__).parent
PRIVATE = re.compile(
    r"""\btorch(\.\w+)*\._(?!_)\w+                   # torch._C, torch.nn.modules._x
    | \bfrom\ torch[\w.]*\ import\ [^\n]*\b_\w+     # from torch.x import _y
    | \bfrom\ torch(\.\w+)*\._\w+                   # from torch._x
    | \._(cdata|version|is_view|backward_hooks|backward_pre_hooks|forward_hooks|post_accumulate_grad_hooks
         |execution_engine|current_level|make_wrapper_subclass|active_ddp_module
         |unscale_grads_|optimizer_load_state_dict_\w+|schema|indices|n_microbatches|has_backward)\b
    | \b(module|one|me|model|layer|child)\._(parameters|modules|buffers)\b""",
    re.VERBOSE,
)


def test_private_names_stand_in_one_file():
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        if path.name == "_torch.py" or "triton" in path.relative_to(SOURCES).parts:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = line.partition("#")[0].replace("._version import __version__", "")  # ours, not a tensor's
            if PRIVATE.search(code) and "``" not in code:
                found.append(f"{path.relative_to(SOURCES)}:{number}: {line.strip()}")
    assert found == []


def test_the_pattern_finds_what_it_should():
    for line in (
        "torch._C._current_graph_task_id()",
        "from torch._subclasses.fake_tensor import FakeTensorMode",
        "from torch.utils._pytree import tree_map_only",
        "from torch.nn.modules.module import _has_any_global_hook",
        "x.untyped_storage()._cdata",
        "param._backward_hooks",
    ):
        assert PRIVATE.search(line), line


class Watching(torch.autograd.Function):
    """Asks in backward what ``ask`` asks."""

    ask = staticmethod(lambda: None)
    answers: list = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Watching.answers.append(Watching.ask())
        return grad


@pytest.fixture
def watching():
    Watching.answers.clear()
    yield Watching
    Watching.ask = staticmethod(lambda: None)


def test_nodes_are_watched_but_for_ours():
    hook_fires_without_gradient()  # asked once per process, by a node
    watch()  # once per process, too, by the first fold
    created, before = [], _torch.BackwardNode.__init__
    try:
        _torch.watch_nodes(created.append)
        y = Watching.apply(torch.ones(2, requires_grad=True))
        model = nn.Linear(2, 2)
        gradfold.fold(model, gradfold.SGD(model.parameters(), lr=0.1))
        model(torch.ones(1, 2))
    finally:
        _torch.BackwardNode.__init__ = before
    assert created == [y.grad_fn]
    assert _torch.function_of(y.grad_fn) is Watching
    assert _torch.next_nodes(y.grad_fn) == [node for node, _ in y.grad_fn.next_functions]


def test_checkpoints_are_of_one_function():
    x = torch.ones(2, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)
    assert _torch.function_of(y.grad_fn) is _torch.checkpoint_function


def test_the_end_of_a_node_is_told_each_time_in_its_backward():
    tasks = []
    y = Watching.apply(torch.ones(2, requires_grad=True))
    _torch.at_node_end(y.grad_fn, lambda *_: tasks.append(_torch.current_graph_task()))
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert len(set(tasks)) == 2 and _torch.NO_TASK not in tasks


def test_backwards_have_numbers(watching):
    assert _torch.current_graph_task() == _torch.NO_TASK
    watching.ask = staticmethod(_torch.current_graph_task)
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        watching.apply(x).sum().backward()
    assert len(set(watching.answers)) == 2 and _torch.NO_TASK not in watching.answers


def test_the_engine_says_what_it_will_execute(watching):
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    nodes = [torch.autograd.graph.get_gradient_edge(leaf).node for leaf in (x, y)]
    watching.ask = staticmethod(lambda: [_torch.will_execute(node) for node in nodes])
    watching.apply(x).sum().backward()
    (watching.apply(x) * y).sum().backward()
    (watching.apply(x) * y).sum().backward(inputs=[y])
    assert watching.answers[:2] == [[True, False], [True, True]]


def test_nodes_and_frames(watching):
    def frames():
        frame, codes = sys._getframe(), []
        while frame is not None:
            codes.append(frame.f_code)
            frame = frame.f_back
        return codes

    watching.ask = staticmethod(frames)
    x = torch.ones(2, requires_grad=True)
    y = watching.apply(x)
    assert isinstance(y.grad_fn, _torch.BackwardNode)
    assert not _torch.is_graphed(y.grad_fn)
    watching.__module__, before = torch.cuda.graphs.__name__, watching.__module__
    assert _torch.is_graphed(y.grad_fn) and "class Graphed(" in inspect.getsource(torch.cuda.graphs)
    watching.__module__ = before
    y.sum().backward()
    assert _torch.CALLS_BACKWARD in watching.answers[0] and _torch.CALLS_ENGINE in watching.answers[0]

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            assert _torch.CALLS_FORWARD in frames()
            return x.clone()

    Forward.apply(x)


def test_a_function_applied_directly(watching):
    x = torch.ones(2, requires_grad=True)
    _torch.direct_apply(watching)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2)) and len(watching.answers) == 1


def test_a_callback_at_the_end(watching):
    order = []
    watching.ask = staticmethod(lambda: _torch.at_task_end(lambda: order.append("end")))
    x = torch.ones(2, requires_grad=True)
    x.register_post_accumulate_grad_hook(lambda _: order.append("leaf"))
    watching.apply(x).sum().backward()
    assert order == ["leaf", "end"]


def test_versions_views_and_memory():
    x = torch.ones(4)
    before = _torch.version(x)
    _torch.increment_version((x,))
    x.add_(1)
    assert _torch.version(x) == before + 2
    assert _torch.is_view(x[:2]) and not _torch.is_view(x) and not _torch.is_view(x.clone())
    assert torch.equal(_torch.unsafe_view(x[:2]), x[:2])
    assert _torch.storage_key(x) == _torch.storage_key(x[1:]) != _torch.storage_key(x.clone())
    assert _torch.storage_address(x.untyped_storage()) == _torch.storage_key(x)
    assert _torch.data_ptr(x) == x.data_ptr()
    shared = [
        torch.from_numpy(x.clone().numpy()),
        x.clone().share_memory_(),
        torch.frombuffer(bytearray(4), dtype=torch.int32),
    ]
    assert [_torch.is_shared(t) for t in (x, x[1:], *shared)] == [False, False, True, True, True]
    other = torch.zeros(4)
    first, second = _torch.implementation(x), _torch.implementation(other)
    torch.utils.swap_tensors(x, other)
    assert (_torch.implementation(x), _torch.implementation(other)) == (second, first)


def test_hooks():
    x = torch.ones(2, requires_grad=True)
    assert not _torch.gradient_hooks(x) and not _torch.post_accumulate_hooks(x)
    one, other = x.register_hook(lambda grad: grad), x.register_post_accumulate_grad_hook(lambda leaf: None)
    assert list(_torch.gradient_hooks(x)) == [one.id] and list(_torch.post_accumulate_hooks(x)) == [other.id]
    module = nn.Linear(2, 2)
    assert not _torch.has_hooks(module) and not _torch.has_global_hooks()
    handle = module.register_forward_hook(lambda *_: None)
    assert _torch.has_hooks(module) and not _torch.has_hooks(module, forward=False)
    handle.remove()
    module.register_full_backward_pre_hook(lambda *_: None)
    assert _torch.has_hooks(module, forward=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert _torch.has_global_hooks()
    handle.remove()


def test_modules():
    module = nn.Sequential(nn.Linear(2, 2))
    assert list(_torch.own_modules(module)) == ["0"] and list(_torch.own_parameters(module[0])) == ["weight", "bias"]
    nn.utils.parametrizations.weight_norm(module[0])
    assert "weight" not in _torch.own_parameters(module[0])
    assert set(_torch.own_buffers(nn.BatchNorm1d(2))) == {"running_mean", "running_var", "num_batches_tracked"}
    assert _torch.active_ddp() is None


def test_transforms():
    seen = []

    def look(x):
        seen.append((_torch.is_transforming(), _torch.is_batched(x)))
        return x.sum()

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(3, 2))
    torch.func.grad(look)(torch.ones(2))
    assert seen == [(False, False), (True, True), (True, False)]
    assert not _torch.is_tracing()
    x = torch.ones(2)
    assert _torch.unwrap_if_dead(x) is x
    traced = []
    torch.jit.trace(lambda x: traced.append(_torch.is_tracing()) or x + 1, (x,), check_trace=False)
    assert traced[0]


def test_without_modes():
    with _torch.FakeTensorMode():
        assert type(torch.ones(2)) is not torch.Tensor
        with _torch.without_modes():
            assert type(torch.ones(2)) is torch.Tensor


def test_a_tensor_without_memory():
    class Kind(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "asked"

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    made = _torch.tensor_without_memory(Kind, (2, 3), torch.float16, torch.device("cpu"), True)
    with _torch.without_torch_function():
        assert made.shape == (2, 3) and made.dtype == torch.float16 and made.requires_grad
    assert made.sum() == "asked"


def test_parts_of_a_sparse_tensor():
    indices, values = _torch.sparse_parts(torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True))
    assert indices.tolist() == [[0, 0]] and values.tolist() == [1.0, 2.0]


def test_schemas():
    schema = _torch.schema_of(torch.ops.aten.add_.Tensor)
    assert schema.name == "aten::add_" and schema.is_mutable
    assert _torch.schema_of(len) is None


def test_operators_pass_through_a_mode():
    class Counts(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(_torch.schema_of(func).name)
            return func(*args, **(kwargs or {}))

    seen = []
    with Counts():
        torch.ones(2) + 1
    assert seen == ["aten::ones", "aten::add"]


def test_fake_tensors():
    mode = _torch.FakeTensorMode()
    with _torch.FakeCopyMode(mode):
        fake = copy.deepcopy(nn.Linear(2, 2)).weight
    assert fake.fake_mode is mode
    assert _torch.tree_map_only(torch.Tensor, len, [fake, 3]) == [2, 3]
    assert not _torch.is_traceable_wrapper_subclass(fake)
    with mode, pytest.raises(_torch.DynamicOutputShapeException):
        torch.ones(2).nonzero()
    with mode, _torch.unset_fake_temporarily():
        assert type(torch.ones(2)) is torch.Tensor


def test_optimizers():
    optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    assert not _torch.load_pre_hooks(optimizer) and not _torch.load_post_hooks(optimizer)
    before = optimizer.register_load_state_dict_pre_hook(lambda *_: None)
    after = optimizer.register_load_state_dict_post_hook(lambda *_: None)
    assert list(_torch.load_pre_hooks(optimizer)) == [before.id]
    assert list(_torch.load_post_hooks(optimizer)) == [after.id]
    _torch.watch_step(optimizer)
    assert not _torch.replaced_step(optimizer) and "step" not in vars(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert not _torch.replaced_step(optimizer) and "step" in vars(optimizer)
    theirs = vars(optimizer)["step"]
    _torch.watch_step(optimizer)
    assert vars(optimizer)["step"] is not theirs
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's of a scheduler whose optimizer was changed, or has not stepped
        scheduler.step()
    optimizer.step = lambda: None
    assert _torch.replaced_step(optimizer)


def test_a_scaler_shows_on_the_stack():
    class Looks(list):
        def __iter__(self):
            looking.append(sys._getframe(1).f_code is _torch.UNSCALES)
            return super().__iter__()

    looking = []
    x = torch.ones(2, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([x], lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(x.sum()).backward()
    optimizer.param_groups = Looks(optimizer.param_groups)
    scaler.unscale_(optimizer)
    assert looking == [True]


def test_fused_kernels():
    for kernel in (_torch.fused_adam, _torch.fused_adamw, _torch.fused_adagrad, _torch.fused_sgd):
        assert callable(kernel)
    assert _torch.multiplies(torch.bfloat16) in (True, False)


@pytest.mark.parametrize("function", [*_torch.CLIPPING.values(), _torch.TOTAL_NORM])
def test_what_lies_behind_torchs_wrapper_is_what_runs(function):
    cell = _torch.behind_wrapper(function)
    plain = cell.cell_contents
    cell.cell_contents = lambda *args, **kwargs: (args, kwargs, torch.is_grad_enabled())
    try:
        assert function(1, b=2) == ((1,), {"b": 2}, False)
    finally:
        cell.cell_contents = plain


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_what_fsdp2_keeps(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    _torch.unwatch_parallel()
    model, mesh = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, mesh=mesh)
    outer, inner = _torch.fsdp_states(model)
    (group,) = _torch.fsdp_groups(inner)
    weight = group.fsdp_params[0]
    assert group.mesh_info.mesh is mesh and weight.sharded_param is model[0].weight
    assert _torch.gathered_param(weight) is None and _torch.shown_params(weight) == []
    states = [_torch.fsdp_is_to_end(inner)]
    idle = []
    model[1].register_forward_hook(lambda *_: idle.append(_torch.fsdp_is_idle(_torch.fsdp_groups(outer)[0])))
    model[0].weight.register_post_accumulate_grad_hook(lambda _: states.append(_torch.fsdp_is_to_end(inner)))
    loss = model(torch.ones(1, 2)).sum()
    assert _torch.shown_params(weight) == [_torch.gathered_param(weight)]
    assert idle == [False] and _torch.fsdp_is_idle(group)
    assert model[1].weight is _torch.gathered_param(_torch.fsdp_groups(outer)[0].fsdp_params[0])
    loss.backward()
    _torch.wait_for_offload(weight)
    assert states == [False, True] and not _torch.fsdp_is_to_end(inner)
    group.reshard()
    assert model[0].weight is weight.sharded_param
    shards = mesh.get_group()
    assert _torch.fsdp_route(group, weight) == (shards, None, 1.0)
    model.set_gradient_divide_factor(4.0)
    (other,) = _torch.fsdp_groups(outer)
    assert _torch.fsdp_route(other, other.fsdp_params[0]) == (shards, None, 4.0)
    assert _torch.fsdp_sums(group)
    model.set_requires_gradient_sync(False)
    assert not _torch.fsdp_sums(group)


def test_many_ranks():
    import datetime

    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

    limit = datetime.timedelta(seconds=7)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    try:
        group = dist.group.WORLD
        assert _torch.timeout_of(group) == limit
        _torch.store_of(group).set("key", "value")
        assert _torch.store_of(group).get("key") == b"value"

        mesh = init_device_mesh("cpu", (1,))
        part = torch.arange(6.0).view(2, 3)
        spread = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        assert _torch.local_tensor(spread).data_ptr() == part.data_ptr()
        assert _torch.shard_geometry((2, 3), mesh, [Shard(0)]) == ([2, 3], [0, 0])

        waiting = spread.redistribute(placements=[Replicate()]).to_local()
        assert torch.equal(_torch.completed(waiting), part)
        assert _torch.completed(part) is part

        _torch.unwatch_redistribution()
        noted = []
        before = _torch.BackwardNode.__init__
        _torch.watch_nodes(lambda node: noted.append(_torch.function_of(node).__name__))
        try:
            leaf = part.clone().requires_grad_(True)
            there = DTensor.from_local(leaf, mesh, [Shard(0)], run_check=False)
            back = there.redistribute(placements=[Replicate()]).to_local()
            assert type(back.grad_fn).__name__ == "_ToTorchTensorBackward"
        finally:
            _torch.BackwardNode.__init__ = before
        assert noted == []
    finally:
        dist.destroy_process_group()


def test_schedules_of_pipelines(tmp_path):
    """One process is a whole pipeline, of one stage and of two."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        device = torch.device("cpu")
        one = pipelining.PipelineStage(nn.Linear(2, 2), 0, 1, device)
        two = [pipelining.PipelineStage(nn.Linear(2, 2), number, 2, device) for number in range(2)]
        loss = nn.functional.mse_loss
        single = pipelining.ScheduleGPipe(one, 3, loss_fn=loss)
        multi = schedules.ScheduleInterleaved1F1B(two, 4, loss_fn=loss)
        kinds = _torch.pipeline_schedules()
        assert [isinstance(schedule, kinds) for schedule in (single, multi)] == [True, True]
        assert isinstance(single, kinds[0]) and not isinstance(multi, kinds[0])
        assert all(inspect.isfunction(kind.step) for kind in kinds)
        assert _torch.stages_of(single) == [one]
        assert _torch.stages_of(multi) == two
        assert (_torch.micro_batches(single), _torch.micro_batches(multi)) == (3, 4)
        assert _torch.runs_backward(single) and not _torch.runs_backward(pipelining.ScheduleGPipe(one, 3))
        assert one.dw_builder is None and single.scale_grads  # public, and read by fold_stage
    finally:
        torch.distributed.destroy_process_group()
