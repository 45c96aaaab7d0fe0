"""Accumulation and clipping on real architectures: what torch does with stored gradients, from tapes."""

import pytest

from tests.accumulated import check
from tests.models.test_models import CHECKPOINTED
from tests.models.test_models import MODELS as ARCHITECTURES
from tests.pairs import in_turn

MODES = {
    "accumulated": {"accumulate": 4},
    "clipped": {"clip_norm": 1e-2},
    "both": {"accumulate": 4, "clip_norm": 1e-2},
}
pytestmark = pytest.mark.usefixtures("precise")


def trained(name, mode, prepare=lambda model: None):
    make, loss = ARCHITECTURES[name]

    def prepared():
        model = make().train()
        prepare(model)
        return model

    _, fold = check(prepared, loss, MODES[mode], steps=2)
    assert fold.grad_norm is not None and fold.grad_norm > MODES[mode].get("clip_norm", 0)  # clipping was active


@in_turn(name=ARCHITECTURES, mode=MODES)
def test_two_steps(name, mode):
    trained(name, mode)


@in_turn(2, name=CHECKPOINTED, how=[(reentrant, mode) for mode in MODES for reentrant in (True, False)])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_with_its_own_gradient_checkpointing(name, how):
    reentrant, mode = how

    def prepare(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    trained(name, mode, prepare)
