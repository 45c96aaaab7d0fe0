"""What streaming holds on the device, and what crosses the link."""

import pytest
import torch

import gradfold
from gradfold import Stream
from gradfold.streaming import streamed_bytes
from tests.allocator import peak_bytes
from tests.llama import small_llama

from .scenes import folded, llama, loss_of, train

H, T = 64, 256
RANDOM_BYTES = torch.get_rng_state().nbytes  # which a checkpoint keeps


def model_of(layers):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(small_llama(256, hidden_size=H, num_hidden_layers=layers)).train()


def measured(layers, stream=None, states=None):
    """A second step's peak above what is there between steps, and the fold."""
    model = model_of(layers)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-3, states=states)
    if stream is None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fold = gradfold.fold(model, optimizer, **({} if stream is None else {"stream": stream}))
    ids = torch.randint(0, 256, (1, T), generator=torch.Generator().manual_seed(0))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return peak_bytes(step), fold, model, optimizer


@pytest.mark.parametrize("blocks", [2, 3])
def test_device_bytes(blocks, tmp_path):
    """The device holds `blocks` blocks, two tiles of states, and what a checkpointed step has in activations."""
    tile = 2**15
    stream = Stream(offload="disk", folder=tmp_path, blocks=blocks, tile_bytes=tile)
    above, fold, model, _ = measured(6, stream)
    plain, other, _, _ = measured(6)
    streamer = fold._state.streamer
    held = sum(tensor.nbytes for tensor in streamer.device_tensors())
    block = max(sum(param.nbytes for param in layer.parameters()) for layer in model.model.layers)
    assert held <= blocks * (block + 64 * 9) + 2 * tile
    assert above <= plain + 2 * T * H * 4  # of activations of one block, boundaries and scratch
    weights = sum(param.nbytes for param in model.parameters())
    assert held < weights / 2  # else this test could not fail
    assert sum(tensor.nbytes for tensor in streamer.host_tensors()) >= 2 * weights
    assert other.traffic is None


def test_activations_of_one_block(tmp_path):
    """Each further block costs its input alone."""
    few, many = (measured(n, Stream(offload="disk", folder=tmp_path))[0] for n in (4, 8))
    assert many - few == 4 * (T * H * 4 + RANDOM_BYTES)


def test_activations_on_the_host(tmp_path):
    """activations="host": not even that."""
    stream = Stream(offload="disk", folder=tmp_path, activations="host")
    few, many = (measured(n, stream)[0] for n in (4, 8))
    assert many - few == 4 * RANDOM_BYTES
    kept, _, one, _ = measured(4, Stream(offload="disk", folder=tmp_path))
    _, _, two, _ = measured(4, stream)
    assert few <= kept - 3 * T * H * 4
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("blocks", [2, 3, 4, 9])
@pytest.mark.parametrize("tile_bytes", [600, 2**20])
def test_traffic_is_the_formula(blocks, tile_bytes):
    """In every step, also the first one, whose order is a guess."""
    model, optimizer, fold = folded("llama", Stream(blocks=blocks, tile_bytes=tile_bytes))
    states = sum(t.nbytes for entry in optimizer.state.values() for t in entry.values() if t.dim())
    sizes = [sum(param.nbytes for param in layer.parameters()) for layer in model.model.layers]
    expected = streamed_bytes(sizes, states, blocks)
    for step in range(3):
        train(model, optimizer, [step], fold)
        found = fold.traffic
        assert found.seconds_waited >= 0
        found.seconds_waited = 0.0
        assert found == expected


def test_an_evaluation_is_no_step_s_traffic():
    """forget_traffic() begins to count anew, and the step after is the formula's again."""
    model, optimizer, fold = folded("llama", Stream())
    train(model, optimizer, range(2), fold)
    expected = fold.traffic
    with torch.no_grad():
        loss_of(model, 5)
    fold._state.streamer.forget_traffic()
    train(model, optimizer, range(2, 3), fold)
    expected.seconds_waited = fold.traffic.seconds_waited
    assert fold.traffic == expected


def test_only_what_changed_goes_home():
    """Of a working set, the weights of the chunk that is awake."""
    working_set = gradfold.WorkingSet(by="layer", interval=1)
    model, optimizer, fold = folded("llama", Stream(), working_set=working_set)
    layer = sum(param.nbytes for param in model.model.layers[0].parameters())
    for _ in range(5):
        awake = any(param.requires_grad for param in model.model.layers.parameters())
        train(model, optimizer, range(1), fold)
        assert fold.traffic.weights_to_host == (layer if awake else 0)


def test_waits_are_counted(monkeypatch):
    """How long a step has waited for copies is told."""
    import time

    from gradfold.streaming.copies import NoLanes

    copy = NoLanes.copy

    def slow(self, pairs, after):
        time.sleep(0.01)
        copy(self, pairs, after)

    monkeypatch.setattr(NoLanes, "copy", slow)
    model, optimizer, fold = folded(llama, Stream())
    train(model, optimizer, range(2), fold)
    assert fold.traffic.seconds_waited > 0.05
