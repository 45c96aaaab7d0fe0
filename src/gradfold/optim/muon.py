"""Muon, and how a model's parameters are split between it and AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack, cast

from torch import Tensor, nn
from torch.nn import UninitializedParameter

from gradfold._options import OptimizerOptions, StorageOptions
from gradfold.rules import AdamRule, MuonRule, Rule

from .adam import AdamW
from .base import RuleOptimizer
from .ranges import at_least_zero

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADJUSTMENTS = (None, "original", "match_rms_adamw")
RULES = ("muon", "adamw")

# what a group with rule="adamw" has where it does not say: AdamW's defaults
_ADAMW: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": True,
}


class Muon(RuleOptimizer):
    """Muon, with the arguments, defaults and formula of ``torch.optim.Muon``: for the matrices of hidden layers.

    Formula: ``gradfold/rules/muon.py``, after Jordan et al., 2024. The rest of a model (embeddings, head, norms,
    biases) trains with AdamW: by a second optimizer in the same fold, or in a param_group of this one that has the key
    ``rule="adamw"`` and AdamW's own hyper-parameters. ``muon_groups`` splits a model for either.

    Folded, a gradient goes into the momentum a few rows at a time. The orthogonalisation works in scratch memory that
    all parameters share: for the largest matrix ``[N, K]``, N <= K, about ``4 N K + 4 N N`` bytes.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch; 2-D ones, but for ``rule="adamw"``.
        lr: Learning rate, a float or a one-element tensor.
        weight_decay: Decoupled weight decay.
        momentum: Decay rate of ``momentum_buffer``.
        nesterov: Use Nesterov momentum.
        ns_coefficients: The coefficients of the Newton-Schulz iteration.
        eps: The least norm that a direction is divided by.
        ns_steps: Iterations, below 100.
        adjust_lr_fn: How the learning rate depends on a matrix's shape: "original" (or None), or "match_rms_adamw",
            with which AdamW's learning rates and weight decays can be kept.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size`` and
            ``seed``, see ``StorageOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range, or a parameter is not 2-D.
        TypeError: An unknown keyword argument.

    Example:
        >>> matrices, others = gradfold.muon_groups(model)
        >>> muon = gradfold.Muon(matrices, lr=0.02)
        >>> adamw = gradfold.AdamW(others, lr=3e-4)
        >>> fold = gradfold.fold(model, [muon, adamw])
    """

    rule = MuonRule()
    torch_only = ()
    _adamw: ClassVar[Rule] = AdamRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **storage: Unpack[StorageOptions],
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        for name in ("foreach", "fused", "differentiable", "capturable"):
            if name in storage:  # torch's Muon has none of them
                raise TypeError(f"Muon() got an unexpected keyword argument {name!r}")
        super().__init__(params, defaults, cast(OptimizerOptions, storage))

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that steps the parameters of a group: its key ``rule`` names another than Muon."""
        return self._adamw if group.get("rule") == "adamw" else self.rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param_group; one with ``rule="adamw"`` has AdamW's defaults where it does not say otherwise.

        Raises:
            ValueError: A hyper-parameter is out of range, or a parameter is not 2-D.
            FoldError: A parameter is not in the folded model, or cannot be folded. The group is not added then.
        """
        if isinstance(param_group, dict) and param_group.get("rule") == "adamw":
            param_group = {**_ADAMW, **param_group}
        super().add_param_group(param_group)

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range, or a parameter is no matrix."""
        if group.get("rule", "muon") not in RULES:
            raise ValueError(f"rule={group['rule']!r}: one of {', '.join(map(repr, RULES))}")
        if group.get("capturable"):
            raise ValueError("capturable=True: Muon's norms are read on the host, as torch's Muon has no such option")
        if group.get("rule") == "adamw":
            AdamW.validate(group)
            return
        at_least_zero(group, "lr", "weight_decay", "momentum", "eps")
        if group["adjust_lr_fn"] not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn={group['adjust_lr_fn']!r}: one of {', '.join(map(repr, ADJUSTMENTS))}")
        steps, coefficients = group["ns_steps"], group["ns_coefficients"]
        if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps < 100:
            raise ValueError(f"ns_steps={steps!r}: a whole number from 0 to 99")
        if len(coefficients) != 3 or not all(math.isfinite(one) for one in coefficients):
            raise ValueError(f"ns_coefficients={coefficients!r}: three numbers")
        for index, param in enumerate(group["params"]):
            if not isinstance(param, UninitializedParameter) and param.dim() != 2:
                name = group["param_names"][index] if "param_names" in group else f"parameter {index} of its group"
                raise ValueError(
                    f"{name}, of shape {tuple(param.shape)}: Muon orthogonalises matrices, and takes 2-D parameters "
                    "only; gradfold.muon_groups(model) splits a model into those and the rest, which AdamW steps, by "
                    'an optimizer of its own or in a group with rule="adamw"'
                )


Named = list[tuple[str, nn.Parameter]]


def muon_groups(model: nn.Module) -> tuple[Named, Named]:
    """Split a model's trainable parameters between Muon and AdamW, as the field does.

    Muon takes the matrices of hidden layers: 2-D weights that are neither an embedding nor the output layer. AdamW
    takes the rest: embeddings, the head, norms, biases, and everything that is not 2-D. A head is what
    ``get_output_embeddings()`` returns (transformers), what shares its weight with an embedding, a module whose own
    name is ``lm_head``, ``head``, ``output``, ``classifier``, ``score`` and the like, or, where nothing of the kind is
    found, the last Linear of the model.

    Args:
        model: The model, before or after folding.

    Returns:
        Two lists of names and parameters, each as ``named_parameters()`` gives them: for Muon, and for AdamW. Each
        can be given to an optimizer, or as ``params`` of a param_group.

    Example:
        >>> matrices, others = gradfold.muon_groups(model)
        >>> both = [gradfold.Muon(matrices, lr=0.02), gradfold.AdamW(others, lr=3e-4)]
        >>> fold = gradfold.fold(model, both)

        Or in one optimizer:

        >>> groups = [{"params": matrices}, {"params": others, "rule": "adamw", "lr": 3e-4, "weight_decay": 0.0}]
        >>> optimizer = gradfold.Muon(groups, lr=0.02)
    """
    outside = _not_hidden(model)
    matrices: Named = []
    others: Named = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            hidden = param.dim() == 2 and id(param) not in outside
            (matrices if hidden else others).append((name, param))
    return matrices, others


HEADS = frozenset(
    {
        "lm_head",
        "head",
        "heads",
        "output",
        "output_layer",
        "embed_out",
        "unembed",
        "classifier",
        "score",
        "decoder_head",
    }
    | {"cls_head", "qa_outputs", "fc_out", "logits", "to_logits"}
)


def _not_hidden(model: nn.Module) -> set[int]:
    """Return the ids of the weights of embeddings and of output layers."""
    found: set[int] = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found.add(id(weight))
    heads = [module for module in [_output_of(model)] if module is not None]
    heads += [module for name, module in model.named_modules() if name and "." not in name and name in HEADS]
    if not heads and not any(_shares(module, found) for module in model.modules()):
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        heads = linears[-1:]
    for head in heads:
        found.update(id(param) for param in head.parameters())
    return found


def _output_of(model: nn.Module) -> nn.Module | None:
    """Return the head that a model of transformers names."""
    ask = getattr(model, "get_output_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except NotImplementedError:  # a wrapper that passes nothing on
        return None
    return found if isinstance(found, nn.Module) else None


def _shares(module: nn.Module, embeddings: set[int]) -> bool:
    """Return whether a module that is no embedding has the weight of one."""
    weight = getattr(module, "weight", None)
    return id(weight) in embeddings and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
