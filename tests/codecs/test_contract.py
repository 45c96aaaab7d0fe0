"""What every codec promises: parts, shapes, bytes, views, names; and files that hold them."""

import copy
import io
import itertools
import math

import pytest
import torch

from gradfold.codecs import BLOCK, MASTERS, STATES, matrix, state_codec, weight_codec

STATE_CODECS = {f"{name} signed": state_codec(name, True) for name in STATES} | {
    f"{name} unsigned": state_codec(name, False) for name in STATES
}
WEIGHT_CODECS = {
    "weight fp32": weight_codec(torch.float32),
    "weight bf16": weight_codec(torch.bfloat16),
    "weight fp16": weight_codec(torch.float16),
    **{name: weight_codec(torch.bfloat16, name) for name in MASTERS},
}
CODECS = STATE_CODECS | WEIGHT_CODECS
every_codec = pytest.mark.parametrize("codec", list(CODECS.values()), ids=list(CODECS))
SHAPES = [(), (1,), (7,), (300,), (0,), (3, 0), (0, 5), (5, 3), (4, 129), (6, 256)]
SHAPES += [(64, 8, 3, 3), (3, 5, 200), (2, 2, 2)]


@pytest.mark.parametrize(
    "shape, lead, columns",
    [
        ((), (), 1),
        ((9,), (), 9),
        ((4, 6), (4,), 6),
        ((8, 3, 200), (8, 3), 200),
        ((64, 32, 3, 3), (64,), 288),
        ((64, 200, 3, 3), (64,), 1800),
        ((8, 16, 64, 64), (8, 16), 4096),
        ((8, 2, 2), (8,), 4),
        ((3, 0), (3,), 0),
    ],
)
def test_matrix(shape, lead, columns):
    """Rows times the last dimension, joined by those before it while narrower than a block, but never by the first."""
    assert matrix(shape) == (lead, columns)
    assert matrix(shape).rows * columns == math.prod(shape) or not columns


@every_codec
def test_parts_are_allocated_as_announced(codec):
    for shape in SHAPES:
        announced, made = codec.parts(shape), codec.allocate(shape)
        assert list(announced) == list(made), shape
        for name, part in announced.items():
            assert made[name].shape == torch.Size(part.shape) and made[name].dtype == part.dtype, shape
            assert made[name].is_contiguous(), shape
        measured = sum(t.untyped_storage().nbytes() for t in made.values())
        assert codec.bytes_per_element(shape) == measured / max(1, math.prod(shape)), shape
        if len(shape) >= 2:
            assert all(part.shape[0] == shape[0] for part in announced.values()), "dimension 0 can be sharded"


@every_codec
def test_encode_makes_what_allocate_made(codec):
    for shape in SHAPES:
        rows, columns = matrix(shape).rows, matrix(shape).columns
        tile = torch.rand(rows, columns)
        bits = torch.zeros(rows, columns, dtype=torch.int32)
        wanted = {k: (t.shape, t.dtype) for k, t in codec.rows_of(codec.allocate(shape), shape).items()}
        for fresh in (codec.encode(tile), codec.encode(tile, bits)):
            assert {k: (t.shape, t.dtype) for k, t in fresh.items()} == wanted, shape
        decoded = codec.decode(fresh, columns)
        assert decoded.shape == tile.shape and decoded.dtype == torch.float32, shape


@every_codec
def test_allocate_decodes_to_its_start(codec):
    for shape, init in itertools.product(SHAPES, (0.0, 0.5)):
        made = codec.allocate(shape, init=init)
        decoded = codec.decode(codec.rows_of(made, shape), matrix(shape).columns)
        assert torch.equal(decoded, torch.full_like(decoded, init)), shape


@every_codec
def test_rows_of_are_views(codec):
    made = codec.allocate((64, 8, 3, 3))
    for name, view in codec.rows_of(made, (64, 8, 3, 3)).items():
        assert view.dim() == 2 and view.shape[0] == 64 and view.data_ptr() == made[name].data_ptr()


@every_codec
def test_encode_and_decode_leave_their_arguments_alone(codec):
    tile = torch.rand(3, 200)
    kept = tile.clone()
    stored = codec.encode(tile, torch.full((3, 200), 5, dtype=torch.int32))
    copies = {name: t.clone() for name, t in stored.items()}
    codec.decode(stored, 200)
    assert torch.equal(tile, kept) and all(torch.equal(stored[name], copies[name]) for name in copies)


@every_codec
def test_stochastic_says_whether_bits_are_looked_at(codec):
    tile = torch.rand(4, 256)
    bits = torch.randint(0, 2**16, tile.shape, dtype=torch.int32)
    nearest, given = codec.encode(tile), codec.encode(tile, bits)
    same = all(torch.equal(nearest[key], given[key]) for key in nearest)
    assert same != codec.stochastic


# names ----------------------------------------------------------------------------------------------------------------


def test_names():
    assert list(STATES) == ["fp32", "bf16", "int8", "int4"]
    assert state_codec("int8", True) is not state_codec("int8", False)
    assert len({codec.name for codec in CODECS.values()}) == len({id(codec) for codec in CODECS.values()})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="states='int2': one of 'fp32', 'bf16', 'int8', 'int4'"):
        state_codec("int2", True)
    with pytest.raises(ValueError, match="master='split4': one of 'split8', 'split16', or None"):
        weight_codec(torch.bfloat16, "split4")
    with pytest.raises(ValueError, match=r"master='split8' .* torch.float16: use master=None"):
        weight_codec(torch.float16, "split8")
    with pytest.raises(ValueError, match="float64"):
        weight_codec(torch.float64)


# bytes ----------------------------------------------------------------------------------------------------------------

LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
LLAMA_100M = [(32000, 576)] + LAYER * 24

MOST_BYTES = [("fp32", 8.0, 4.0), ("bf16", 4.0, 2.0), ("int8", 2.07, 1.035), ("int4", 1.07, 0.535)]


@pytest.mark.parametrize("name, adamw, lion", MOST_BYTES)
def test_measured_bytes_per_parameter(name, adamw, lion):
    """Of a Llama whose rows end ragged (576 = 4.5 blocks): live storage, all parts."""
    elements = sum(map(math.prod, LLAMA_100M))

    def stored(signed):
        parts = (part for shape in LLAMA_100M for part in state_codec(name, signed).parts(shape).values())
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)

    assert 0.99 * lion <= stored(True) / elements <= lion
    assert 0.99 * adamw <= (stored(True) + stored(False)) / elements <= adamw
    assert state_codec(name, True).bytes_per_element((1024, 1024)) <= lion


def test_measured_bytes_of_masters():
    """Beyond the two of the bf16 weight itself."""
    for name, more in (("split8", 1), ("split16", 2)):
        made = MASTERS[name].allocate((100, 576))
        assert made["values"].dtype == torch.bfloat16
        assert made["residual"].untyped_storage().nbytes() == more * 57600
        assert MASTERS[name].bytes_per_element((100, 576)) == 2 + more


# files ----------------------------------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_survives_files(codec, how):
    stored = codec.encode(torch.rand(5, 200))
    if how == "torch":
        file = io.BytesIO()
        torch.save(stored, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    else:
        from safetensors.torch import load, save

        loaded = load(save(stored))
    for name, t in stored.items():
        assert loaded[name].dtype == t.dtype and torch.equal(loaded[name], t)


def test_codecs_can_be_copied():
    """An optimizer that holds one is deep-copied with its model."""
    for codec in CODECS.values():
        tile = torch.rand(2, 200)
        for a, b in zip(codec.encode(tile).values(), copy.deepcopy(codec).encode(tile).values(), strict=True):
            assert torch.equal(a, b)


def test_the_block_is_one_for_all():
    """So that one cut serves a weight and all of its states."""
    assert {codec.block for codec in CODECS.values()} == {1, BLOCK}
