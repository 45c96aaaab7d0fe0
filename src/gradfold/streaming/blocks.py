"""The blocks of a model: which modules they are, and which parameters stream with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from gradfold import _torch
from gradfold.errors import FoldError
from gradfold.modules import matching_modules, repeated_modules

from .copies import Ticket

ALIGNMENT = 64  # bytes


class Block:
    """A module whose weights come and go together.

    Attributes:
        name: the module's name.
        module: the module.
        params: its own parameters by their names in it, without those that other modules of the model use too.
        home: where the values of each live while they are not on the device: host memory.
        away: what each parameter shows while its values are not on the device.
        gone: the copies of its weights' last way home.
        starts: where each begins in the memory of a slot, in bytes.
        size_bytes: bytes of a slot that holds them all.
    """

    def __init__(self, name: str, module: nn.Module, params: dict[str, Parameter]):
        self.name, self.module, self.params = name, module, params
        self.home: dict[str, Tensor] = {}
        self.away: dict[str, Tensor] = {}
        self.starts: dict[str, int] = {}
        self.gone: Ticket | None = None
        end = 0
        for key, param in params.items():
            self.starts[key] = end
            end += -(-param.numel() * param.element_size() // ALIGNMENT) * ALIGNMENT
        self.size_bytes = end

    def __repr__(self) -> str:
        return f"Block({self.name!r}, {len(self.params)} parameters, {self.size_bytes} bytes)"

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights, without gaps."""
        return sum(param.numel() * param.element_size() for param in self.params.values())

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """Return each parameter's place in a slot, uint8 ``[bytes]``."""
        made = {}
        for key, home in self.home.items():
            start, size = self.starts[key], home.numel() * home.element_size()
            flat = slot[start : start + size].view(home.dtype)
            made[key] = flat.as_strided(home.shape, home.stride(), flat.storage_offset())
        return made


def blocks_of(model: nn.Module, layers: Sequence[str] | None = None) -> list[Block]:
    """Return the blocks of a model, in the order of its modules.

    Args:
        model: the model.
        layers: names or patterns of the modules; None: the members of the outermost lists of modules.

    Raises:
        FoldError: there are none, one is inside of another, or a name matches none.
    """
    named = dict(model.named_modules())
    if layers is None:
        names = [name for name in repeated_modules(model) if any(True for _ in named[name].parameters())]
    else:
        names = matching_modules(named, layers, "Stream(layers=")
        inside = [name for name in names if any(name.startswith(f"{other}.") for other in names)]
        if inside:
            raise FoldError(f"Stream(layers={list(layers)!r}): {inside[0]!r} is inside of another one of these")
    if not names:
        raise FoldError(
            f"stream=: {type(model).__name__} has no nn.ModuleList of layers that could stream; name modules that run "
            "one after the other with Stream(layers=[...])"
        )
    users = _users(model)
    made = []
    for name in names:
        prefix = f"{name}."
        own = {
            key: param
            for key, param in named[name].named_parameters()
            if all(user == name or user.startswith(prefix) for user in users[id(param)])
        }
        for key, param in own.items():
            if type(param.data) is not Tensor and not hasattr(param, "fake_mode"):
                raise FoldError(
                    f"{prefix}{key}: stream= moves plain tensors, and this is a {type(param.data).__name__}; leave its "
                    "module out of Stream(layers=...)"
                )
        made.append(Block(name, named[name], own))
    return made


def show_home(block: Block) -> list[Any]:
    """Let state_dicts of a block have its values, where its parameters show none while they are away.

    Returns:
        The handles of the hooks.
    """

    def save(module: nn.Module, found: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, param in block.params.items():
            whole = f"{prefix}{key}"
            if whole in found and param.data_ptr() == block.away[key].data_ptr():
                found[whole] = block.home[key]

    def before_loading(module: nn.Module, *_: Any) -> None:
        for key, param in block.params.items():
            if param.data_ptr() == block.away[key].data_ptr():
                param.data = block.home[key]

    def after_loading(module: nn.Module, *_: Any) -> None:
        for key, param in block.params.items():
            if param.data_ptr() == block.home[key].data_ptr():
                param.data = block.away[key]

    module = block.module
    return [
        module.register_state_dict_post_hook(save),
        module.register_load_state_dict_pre_hook(before_loading),
        module.register_load_state_dict_post_hook(after_loading),
    ]


def _users(model: nn.Module) -> dict[int, set[str]]:
    """Return the names of the modules that hold each parameter, by its id."""
    found: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for param in _torch.own_parameters(module).values():
            if param is not None:
                found.setdefault(id(param), set()).add(name)
    return found
