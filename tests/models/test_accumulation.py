"""Accumulation and clipping on real architectures: what torch does with stored gradients, from tapes."""

import pytest

from tests.accumulated import check
from tests.models.test_models import CHECKPOINTED, MODELS, each_model

MODES = {
    "accumulated": {"accumulate": 4},
    "clipped": {"clip_norm": 1e-2},
    "both": {"accumulate": 4, "clip_norm": 1e-2},
}
each_mode = pytest.mark.parametrize("mode", MODES)
pytestmark = pytest.mark.usefixtures("precise")


def trained(name, mode, prepare=lambda model: None):
    make, loss = MODELS[name]

    def prepared():
        model = make().train()
        prepare(model)
        return model

    _, fold = check(prepared, loss, MODES[mode])
    assert fold.grad_norm is not None and fold.grad_norm > MODES[mode].get("clip_norm", 0)  # clipping was active


@each_model
@each_mode
def test_three_steps(name, mode):
    trained(name, mode)


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@each_mode
def test_with_its_own_gradient_checkpointing(name, reentrant, mode):
    def prepare(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    trained(name, mode, prepare)
