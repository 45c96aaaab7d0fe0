"""The architectures of ``benchmarks/architectures.py``: steps equal torch's, and the folded share of each is known."""

import functools

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("precise")

import gradfold  # noqa: E402
from benchmarks.architectures import ARCHITECTURES  # noqa: E402
from benchmarks.folded_share import share  # noqa: E402
from tests.zoo import compare, distance, no_gradients, ours, torchs, twins  # noqa: E402

FOUND = {name: made for models in ARCHITECTURES.values() for name, made in models.items()}
# the smallest share of parameters that folds, where it is not 90%
LEAST = {"mamba": 0.85, "hubert": 0.7, "LSTM": 0.2, "GRU": 0.3, "RNN": 0.5}
LEAST |= dict.fromkeys(ARCHITECTURES["experts"], 0.98)
QUICK = ("falcon", "opt", "qwen3_moe", "whisper", "vit", "dit", "flux", "unet_2d_condition", "MultiheadAttention")


def each(names=None, quick=QUICK):
    names = FOUND if names is None else names
    slow = pytest.mark.slow
    return pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in quick else slow) for n in names])


@pytest.fixture
def made(name):
    if name in ARCHITECTURES["diffusion (diffusers)"]:
        pytest.importorskip("diffusers")
    return FOUND[name]


@each()
def test_share(made, name):
    assert share(*made)["folded_share"] >= LEAST.get(name, 0.9)


def name_of(model):
    return getattr(getattr(model, "config", None), "model_type", "")


def quiet(model):
    """In training mode, with nothing random."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("layerdrop", "activation_dropout", "attention_dropout", "dropout"):
        for module in model.modules():
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    if name_of(model) in ARCHITECTURES["experts"]:
        model.set_experts_implementation("eager")  # torch's grouped products know no fp64
    return model.train()


@each(quick=("falcon", "dit"))
def test_steps(made, name):
    make, loss = made
    assert compare(lambda: quiet(make()), lambda model, o, step: loss(model, step).backward()) <= 1e-10


@each(["opt", "whisper", "sd3", "unet_2d_condition"], quick=("whisper",))
@pytest.mark.parametrize("kind", ["accumulate", "clip", "working_set", "reentrant", "non_reentrant"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_options(made, name, kind):
    make, loss = made
    plain, folded = twins(lambda: quiet(make()))
    theirs, mine = torchs(plain), ours(folded)
    options = {
        "accumulate": {"accumulate": 2},
        "clip": {"clip_norm": 0.1},
        "working_set": {"working_set": gradfold.WorkingSet(chunks=1)},
    }
    gradfold.fold(folded, mine, **options.get(kind, {}))
    for model in (plain, folded):
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if "reentrant" in kind and enable is None:
            model.enable_gradient_checkpointing(
                functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=kind == "reentrant")
            )
        elif "reentrant" in kind:
            enable({"use_reentrant": kind == "reentrant"})
    for model, optimizer in ((plain, theirs), (folded, mine)):
        for step in range(2):
            for micro in range(1 + (kind == "accumulate")):
                loss(model, 2 * step + micro).backward()
            if kind == "clip" and model is plain:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert no_gradients(folded) and distance(folded, plain) <= 1e-10
