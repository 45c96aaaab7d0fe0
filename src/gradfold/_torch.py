"""Every private name of torch that gradfold uses (``backends/triton`` excepted), one function or constant each.

Torch does not promise to keep them. If a release changes one, only this file has to change;
``tests/test_torch_names.py`` tries each of them.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.autograd import Variable, forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_map_only

__all__ = [
    "NO_TASK",
    "BackwardNode",
    "DynamicOutputShapeException",
    "FakeCopyMode",
    "FakeTensorMode",
    "TorchDispatchMode",
    "is_traceable_wrapper_subclass",
    "tree_map_only",
    "unset_fake_temporarily",
]

# autograd -------------------------------------------------------------------------------------------------------------

NO_TASK = -1

current_graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The id of the backward this thread is in, or ``NO_TASK``; an inner backward has an id of its own."""

will_execute: Callable[[Any], bool] = torch._C._will_engine_execute_node
"""Whether the running backward will reach this node; raises RuntimeError inside ``torch.autograd.grad``."""

BackwardNode: type = torch.autograd.function.BackwardCFunction
"""The graph nodes of autograd Functions written in Python."""


def is_graphed(node: Any) -> bool:
    """Return whether a node is of ``make_graphed_callables``: each replay overwrites the tensors it returned."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and function.__module__ == torch.cuda.graphs.__name__


# code that is on the stack while a backward runs, an autograd Function's backward, and its forward
CALLS_ENGINE = torch.autograd.graph._engine_run_backward.__code__
CALLS_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__
CALLS_FORWARD = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


function_of: Callable[[Any], type[torch.autograd.Function]] = operator.attrgetter("_forward_cls")
"""The autograd Function of a node."""

checkpoint_function: type[torch.autograd.Function] = torch.utils.checkpoint.CheckpointFunction
"""The autograd Function of torch's own reentrant checkpoints."""


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return a Function's ``apply`` without what it does for functorch; callers look for that themselves."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def watch_nodes(created: Callable[[Any], None]) -> None:
    """Call a function with the node of each autograd Function written in Python, as its forward begins.

    Autograd does not list the nodes of a graph, and a walk through all of them in every backward would take longer than
    the backward of a small model. Nothing is called for the Functions of gradfold (``unwatched``).
    """
    before: Any = BackwardNode.__init__

    def init(node: Any) -> None:
        before(node)
        created(node)

    BackwardNode.__init__ = init  # type: ignore[misc]


def unwatched(function: Any) -> Any:
    """Decorate a Function whose backward runs no backward of its own: ``watch_nodes`` leaves it out."""
    function._backward_cls.__init__ = object.__init__
    return function


def next_nodes(node: Any) -> list[Any]:
    """Return the nodes that a node hands gradients to."""
    return [found for found, _ in node.next_functions if found is not None]


def at_node_end(node: Any, callback: Callable[..., None]) -> None:
    """Call a function each time a node has run, inside the backward that ran it; it must not run now."""
    node.register_hook(callback)


def at_task_end(callback: Callable[[], None]) -> None:
    """Call a function when the running backward completes; it is not called if that backward raises."""
    Variable._execution_engine.queue_callback(callback)


version: Callable[[Tensor], int] = operator.attrgetter("_version")
"""A number that grows with each change in place."""

increment_version: Callable[[Iterable[Tensor]], None] = torch._C._increment_version
"""Make graphs that saved a tensor notice that it has changed."""

is_view: Callable[[Tensor], bool] = operator.methodcaller("_is_view")
"""Whether autograd knows the tensor as a view of another."""


def unsafe_view(tensor: Tensor) -> Tensor:
    """Return the same numbers as a tensor that autograd does not take for a view."""
    return torch.ops.aten._unsafe_view.default(tensor, tensor.shape)


base_of: Callable[[Tensor], Tensor | None] = operator.attrgetter("_base")
"""The tensor of which autograd knows this one as a view; None if it is none."""


gradient_hooks: Callable[[Tensor], Mapping[int, Any] | None] = operator.attrgetter("_backward_hooks")
"""The hooks that ``register_hook`` has put on a leaf."""

saving_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
"""The innermost pair of hooks that is called for saved tensors, as non-reentrant checkpoints set one; else None."""


post_accumulate_hooks: Callable[[Tensor], Mapping[int, Any] | None] = operator.attrgetter("_post_accumulate_grad_hooks")
"""The hooks that ``register_post_accumulate_grad_hook`` has put on a leaf."""


# memory ---------------------------------------------------------------------------------------------------------------


storage_address: Callable[[torch.UntypedStorage], int] = operator.attrgetter("_cdata")
"""Where a storage lies; another may lie there once it has died."""


def storage_key(tensor: Tensor) -> int:
    """Return a number that two living tensors share if they lie in the same storage."""
    return storage_address(tensor.untyped_storage())


def is_shared(tensor: Tensor) -> bool:
    """Return whether others know this memory: NumPy, a buffer, DLPack, another process. They change it unnoticed."""
    storage = tensor.untyped_storage()
    return not storage.resizable() or (tensor.is_cpu and storage.is_shared())


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices and values of a COO tensor, which need not be coalesced."""
    return tensor._indices(), tensor._values()


# transforms and modes -------------------------------------------------------------------------------------------------

_functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
tracing_state: Callable[[], Any] = torch._C._get_tracing_state
"""What ``torch.jit.trace`` has recorded so far; None where it does not run."""
_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_tracing() -> bool:
    """Return whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` records what is computed now."""
    return torch.compiler.is_compiling() or tracing_state() is not None


def is_transforming() -> bool:
    """Return whether functorch or forward-mode AD sees what is computed now."""
    return _transforms_active() or forward_ad._current_level >= 0


unwrap_if_dead: Callable[[Tensor], Tensor] = _functorch.unwrap_if_dead
"""The tensor in a wrapper that has outlived its functorch transform; any other as it is."""


GROUPED_MM: tuple[Callable[..., Tensor], ...] = (nn.functional.grouped_mm, torch._grouped_mm)
"""The functions that multiply tokens, sorted by expert, with their expert's matrix."""

_ALIGNED = 16  # bytes: of the strides that these functions take


def runs_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``F.grouped_mm`` multiplies tokens ``[T, K]`` with experts ``[E, K, N]`` of this kind."""
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    sizes = (*x.shape[-1:], *weight.shape[1:])
    return (x.is_cuda or x.is_cpu) and all(size * x.itemsize % _ALIGNED == 0 and size > 0 for size in sizes)


@functools.cache
def attention_for_modes() -> Callable[..., Any] | None:
    """Return ``F.multi_head_attention_forward``, made of functions that an active TorchFunctionMode sees one by one.

    torch's own hands itself to the mode as a whole, as soon as one is active. None if it does not.
    """
    whole: Any = nn.functional.multi_head_attention_forward
    code = getattr(whole, "__code__", None)
    if code is None or "has_torch_function" not in code.co_names:
        return None
    names = {**whole.__globals__, "has_torch_function": lambda _: False}
    made = types.FunctionType(code, names, whole.__name__, whole.__defaults__, whole.__closure__)
    made.__kwdefaults__ = whole.__kwdefaults__
    return made


def is_batched(tensor: Tensor) -> bool:
    """Return whether this stands for a batch of tensors, under ``vmap``."""
    return _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)


def without_modes() -> contextlib.AbstractContextManager[Any]:
    """Return a context without dispatch modes (fake tensors, selective checkpoints that count operators)."""
    return _disable_current_modes()


def without_torch_function() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a tensor subclass's ``__torch_function__`` is not asked."""
    return torch._C.DisableTorchFunctionSubclass()


implementation: Callable[[Tensor], int] = operator.attrgetter("_cdata")
"""A number that identifies the tensor behind a Python object; ``torch.utils.swap_tensors`` exchanges it."""

data_ptr: Callable[[Tensor], int] = operator.methodcaller("data_ptr")
"""Where a tensor's data lies."""


def schema_of(operator_or_callable: Any) -> Any | None:
    """Return an operator's schema: its name, arguments and what it writes into; None for what is no operator."""
    return getattr(operator_or_callable, "_schema", None)


def tensor_without_memory(kind: type, shape: Any, dtype: torch.dtype, device: torch.device, requires_grad: bool) -> Any:
    """Return a tensor of the subclass ``kind`` that has a shape and no storage."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device, requires_grad=requires_grad)  # type: ignore[attr-defined]


# modules --------------------------------------------------------------------------------------------------------------


own_parameters: Callable[[nn.Module], dict[str, nn.Parameter | None]] = operator.attrgetter("_parameters")
"""The parameters registered on this very module, by name; a parametrized one is not among them."""

own_buffers: Callable[[nn.Module], dict[str, Tensor | None]] = operator.attrgetter("_buffers")
"""The buffers registered on this very module, by name."""

own_modules: Callable[[nn.Module], dict[str, nn.Module | None]] = operator.attrgetter("_modules")
"""The modules registered on this very module, by name."""


def has_hooks(module: nn.Module, forward: bool = True) -> bool:
    """Return whether a hook waits for the module's output (``forward``) or for its gradient."""
    hooks: Any = module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or (forward and bool(module._forward_hooks))


def has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules."""
    return bool(_has_any_global_hook())


_DDP: Any = nn.parallel.DistributedDataParallel if torch.distributed.is_available() else None

active_ddp: Callable[[], Any | None] = functools.partial(getattr, _DDP, "_active_ddp_module", None)
"""The DistributedDataParallel wrapper whose forward is running."""


# optimizers ----------------------------------------------------------------------------------------------------------

# code on the stack while a GradScaler looks for gradients
UNSCALES = torch.amp.GradScaler._unscale_grads_.__code__

load_pre_hooks: Callable[[torch.optim.Optimizer], Mapping[int, Any]] = operator.attrgetter(
    "_optimizer_load_state_dict_pre_hooks"
)
"""The hooks that ``register_load_state_dict_pre_hook`` has put on an optimizer."""

load_post_hooks: Callable[[torch.optim.Optimizer], Mapping[int, Any]] = operator.attrgetter(
    "_optimizer_load_state_dict_post_hooks"
)
"""The hooks that ``register_load_state_dict_post_hook`` has put on an optimizer."""


def replaced_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's ``step`` is neither its class's nor what torch's schedulers put around that."""
    own = vars(optimizer).get("step")
    return own is not None and not hasattr(own, "_wrapped_by_lr_sched")


def watch_step(optimizer: torch.optim.Optimizer) -> None:
    """Put around ``step`` what torch's schedulers have put around that of another class, if they have."""
    if vars(optimizer).pop("step", None) is None:
        return
    step, me = type(optimizer).step, weakref.ref(optimizer)

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        found: Any = me()
        found._opt_called = True
        return step(found, *args, **kwargs)

    watched._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = watched  # type: ignore[method-assign]


# clipping -------------------------------------------------------------------------------------------------------------

CLIPPING: Mapping[str, Any] = {
    name: getattr(nn.utils, name) for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_")
}
"""The functions of ``torch.nn.utils`` that clip the gradients of parameters."""

TOTAL_NORM: Any = nn.utils.get_total_norm
"""The one that takes gradients."""


def behind_wrapper(function: Any) -> Any:
    """Return the cell where torch's no_grad wrapper around one of these keeps the function that it calls.

    What lies in the cell is what runs, also for code that has imported the wrapper by name.
    """
    return function.__closure__[function.__code__.co_freevars.index("func")]


# many ranks -----------------------------------------------------------------------------------------------------------

local_tensor: Callable[[Any], Tensor] = operator.attrgetter("_local_tensor")
"""What this rank holds of a DTensor, outside of autograd's view."""


def shard_geometry(shape: Iterable[int], mesh: Any, placements: Iterable[Any]) -> tuple[list[int], list[int]]:
    """Return shape and offset (both by dimension) of this rank's part of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with _disable_current_modes():  # torch computes them with tensors, which must not be fake
        local, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, tuple(placements))
    return list(local), list(offset)


@functools.cache
def unwatch_redistribution() -> None:
    """Let ``watch_nodes`` leave out the Functions of DTensors, of which every layer has many; none calls a backward."""
    from torch.distributed.tensor import _api, _redistribute

    for module, names in ((_api, ("_ToTorchTensor", "_FromTorchTensor")), (_redistribute, ("Redistribute",))):
        for name in (*names, "NestedRedistribute"):
            if (function := getattr(module, name, None)) is not None:
                unwatched(function)


def completed(tensor: Tensor) -> Tensor:
    """Return a collective's result once it is there; any other tensor as it is."""
    functional: Any = sys.modules.get("torch.distributed._functional_collectives")
    if functional is None or not isinstance(tensor, functional.AsyncCollectiveTensor):
        return tensor
    pending: Any = tensor
    return pending.wait()


def fake_store() -> Any:
    """Return the store of a process group whose collectives do nothing (backend "fake")."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def store_of(group: Any) -> Any:
    """Return the key-value store through which a process group's ranks found each other."""
    return torch.distributed.distributed_c10d._get_process_group_store(group)


def fsdp_states(model: nn.Module) -> list[Any]:
    """Return what FSDP2 keeps of each module that was given to ``fully_shard``, or of several given together."""
    fsdp: Any = sys.modules["torch.distributed.fsdp"]
    modules: list[Any] = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    found = [module._get_fsdp_state() for module in modules]
    return list({id(state): state for state in found}.values())


def fsdp_groups(state: Any) -> list[Any]:
    """Return the groups of parameters that FSDP2 gathers together: of a module one, in newer versions also several."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        one = state._fsdp_param_group
        groups = [] if one is None else [one]
    return list(groups)


def fsdp_route(group: Any, managed: Any) -> tuple[Any, Any, float] | None:
    """Return over which process groups FSDP2 sums a parameter's gradient, and what it divides the sum by.

    Returns:
        The group of the ranks with other shards; that of the ranks with the same shard, or None; the divisor. None for
        a parameter that is not cut by rows, lies on another device than it is used on, or is a DTensor when gathered.
    """
    info = managed.mesh_info
    if not hasattr(info, "shard_process_group") or managed.fsdp_placement.dim != 0 or managed.is_dtensor:
        return None
    if managed.offload_to_cpu and info.mesh.device_type != "cpu":
        return None
    if getattr(group, "reduce_scatter_unused_params", False) or getattr(group, "_all_reduce_hook", None) is not None:
        return None
    copies = getattr(info, "replicate_process_group", None)
    size = info.shard_mesh_size * (1 if copies is None else info.replicate_mesh_size)
    return info.shard_process_group, copies, float(group.gradient_divide_factor or size)


def fsdp_sums(group: Any) -> bool:
    """Return whether FSDP2 sums the gradients of a group when backward leaves it."""
    return group.reduce_grads


def fsdp_is_idle(group: Any) -> bool:
    """Return whether none of the group's modules is in the middle of a forward or backward."""
    return group._training_state.name == "IDLE"


def fsdp_is_to_end(state: Any) -> bool:
    """Return whether FSDP2 has queued what it does when the running backward is over, and has not done it."""
    return state._state_ctx.post_backward_final_callback_queued


def gathered_param(managed: Any) -> Tensor | None:
    """Return the parameter that modules see while FSDP2 has gathered it; None before it first has."""
    return getattr(managed, "_unsharded_param", None)


def shown_params(managed: Any) -> list[Tensor]:
    """Return the parameters that FSDP2 may show in place of the sharded one."""
    found = getattr(managed, "_unsharded_param", None), getattr(managed, "_sharded_post_forward_param", None)
    return [one for one in found if one is not None]


def wait_for_offload(managed: Any) -> None:
    """Wait for a gradient that FSDP2 copies to the host."""
    if (event := managed.grad_offload_event) is not None:
        event.synchronize()


@functools.cache
def unwatch_parallel() -> None:
    """Let ``watch_nodes`` leave out the Functions of FSDP2 and DTensor, none of which runs a backward."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fsdp_state
    from torch.distributed.tensor import _api, _redistribute

    for module in (_fsdp_param_group, _fsdp_state, _api, _redistribute):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, torch.autograd.Function):
                unwatched(kind)


def timeout_of(group: Any) -> datetime.timedelta:
    """Return how long a process group lets its collectives wait."""
    backends = [group._get_backend(device) for device in group._device_types]
    found = [backend.options._timeout for backend in backends if hasattr(backend, "options")]
    return min(found, default=datetime.timedelta(minutes=30))


# pipelines ------------------------------------------------------------------------------------------------------------


def pipeline_schedules() -> tuple[type, ...]:
    """Return the bases of ``torch.distributed.pipelining``'s schedules, of one and several stages; () if not loaded."""
    module: Any = sys.modules.get("torch.distributed.pipelining.schedules")
    return () if module is None else (module.PipelineScheduleSingle, module.PipelineScheduleMulti)


def stages_of(schedule: Any) -> list[Any]:
    """Return the stages that a pipeline's schedule runs on this rank."""
    return list(schedule._stages) if hasattr(schedule, "_stages") else [schedule._stage]


micro_batches: Callable[[Any], int] = operator.attrgetter("_n_microbatches")
"""Into how many micro-batches a pipeline's schedule cuts a batch."""

runs_backward: Callable[[Any], bool] = operator.attrgetter("_has_backward")
"""Whether a pipeline's schedule runs backwards; not in its ``eval``."""


# kernels --------------------------------------------------------------------------------------------------------------

fused_adam: Callable[..., None] = torch._fused_adam_
fused_adamw: Callable[..., None] = torch._fused_adamw_
fused_adagrad: Callable[..., None] = torch._fused_adagrad_
fused_sgd: Callable[..., None] = torch._fused_sgd_


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Return whether this processor has instructions for matrix products in a 16-bit dtype, which torch uses."""
    try:
        if dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except (AttributeError, RuntimeError):  # a build without mkldnn
        return False


# compiled regions -----------------------------------------------------------------------------------------------------

below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd
"""A context in which operators are not recorded by autograd, whose kernel is running."""


def keeps_order() -> bool:
    """Return whether this torch's compilers can be told that an operator has an effect."""
    return _effects() is not None


def keep_in_order(operator: Any) -> None:
    """Tell compilers that an operator has an effect: it is neither dropped nor moved before another one of these."""
    register, kinds = _effects()  # type: ignore[misc]
    register(operator, kinds.ORDERED)


@functools.cache
def _effects() -> tuple[Callable[..., Any], Any] | None:
    try:
        import torch._higher_order_ops.effects as effects
    except ImportError:
        return None
    register, kinds = getattr(effects, "_register_effectful_op", None), getattr(effects, "_EffectType", None)
    return None if register is None or kinds is None else (register, kinds)


def has_compiled() -> bool:
    """Return whether torch.compile has compiled anything in this process, as far as it has not been told to forget."""
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")
    counters: Any = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return bool(getattr(frames, "FRAME_COUNTER", 0)) or (counters is not None and bool(counters["frames"]))


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """Return a module's own parameter ``weight``, if it has one; a compiler traces this line, as it can no getter."""
    return module._parameters.get("weight")


def uncompiled(model: nn.Module) -> tuple[nn.Module, bool]:
    """Return a model without what torch.compile has put around it, and whether it or a part of it is compiled."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return inner, True
    return model, any(module._compiled_call_impl is not None for module in model.modules())


def is_compiled_module(module: nn.Module) -> bool:
    """Return whether ``nn.Module.compile`` was called of this module."""
    return module._compiled_call_impl is not None
