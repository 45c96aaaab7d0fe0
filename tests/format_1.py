"""Format 1 of codes that are never negative (``gradfold/codecs/formats.py``), read a number at a time."""

import copy
import math

import torch

from gradfold.codecs import matrix, state_codec
from gradfold.engine import Region

PER_OCTAVE, TOP, BLOCK = {"int8": 6, "int4": 1}, {"int8": 255, "int4": 15}, 128
# How far a root may be from what it was: half a level upwards from 1 (13/12, 3/2), rounded down, is the most.
BOUND = {"int8": 1 - math.sqrt(12 / 13), "int4": 1 - math.sqrt(2 / 3)}
EXACT = 1e-5  # today's levels lie that close to those of a sixth of an octave


def level_of_then(kind, code):
    """Level of an unsigned code of format 1, in units of its block's largest."""
    if code == 0:
        return 0.0
    octaves, sixths = divmod(TOP[kind] - code, PER_OCTAVE[kind])
    if sixths == 0:
        return 2.0**-octaves
    return 2.0 ** (-octaves - 1) * (1 + (PER_OCTAVE[kind] - sixths) / PER_OCTAVE[kind])


def unpacked(kind, codes, columns):
    """The codes of a row, block by block."""
    rows = []
    for start in range(0, columns, BLOCK):
        n = min(BLOCK, columns - start)
        if kind == "int8":
            rows.append(codes[start : start + n])
            continue
        half = -(-n // 2)
        some = codes[start // 2 : start // 2 + half]
        rows.append(([byte & 15 for byte in some] + [byte >> 4 for byte in some])[:n])
    return rows


def decoded_then(kind, codes, scales, columns):
    """Decode as format 1 did, a number at a time."""
    found = []
    for row, factors in zip(codes.tolist(), scales.tolist(), strict=True):
        for block, scale in zip(unpacked(kind, row, columns), factors, strict=True):
            found += [level_of_then(kind, code) * scale for code in block]
    return torch.tensor(found, dtype=torch.float64)


def moments_of(states, params, name="exp_avg_sq"):
    """Codes, scales and columns of every state of that name, by its parameter's index and the suffix of its slice."""
    found = {}
    for index, one in states.items():
        for key in one:
            plain, bracket, rest = key.partition("[")
            if plain == f"{name}.codes":
                shape = list(params[index].shape)
                if bracket:
                    region = Region.parse(bracket + rest)
                    shape[region.dim] = region.stop - region.start
                columns = matrix(shape).columns
                scales = one[f"{name}.scales{bracket}{rest}"]
                found[index, bracket + rest] = (
                    one[key].reshape(-1, one[key].shape[-1]),
                    scales.reshape(-1, scales.shape[-1]),
                    columns,
                )
    return found


def decoded_now(kind, codes, scales, columns):
    return state_codec(kind, False).decode({"codes": codes, "scales": scales}, columns).double().flatten()


def all_codes(kind, codes, scales, columns):
    return [code for row in codes.tolist() for block in unpacked(kind, row, columns) for code in block]


def close(kind, now, then):
    """Check codes, scales and columns of today against those of format 1 that they were converted from."""
    old, new = decoded_then(kind, *then), decoded_now(kind, *now)
    assert torch.equal(new == 0, old == 0) and old.any()
    change = (new[old > 0] / old[old > 0]).sqrt() - 1
    lowest = torch.tensor(all_codes(kind, *now))[old > 0] == 1
    assert change[~lowest].abs().max() <= BOUND[kind] + EXACT
    assert change[lowest].abs().le(math.sqrt(2) - 1 + EXACT).all()
    scales = now[1]
    assert torch.equal(torch.exp2(scales.log2().round()), scales), "powers of two"


UNSIGNED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def as_format_1(saved):
    """A state_dict with codes and scales of format 1 in place of its own, and without a number, as that wrote it."""
    saved = copy.deepcopy(saved)
    generator = torch.Generator().manual_seed(1)
    for group in saved["param_groups"]:
        del group["format"], group["gradfold"]
    for states in saved["state"].values():
        for key, value in states.items():
            name, _, part = key.partition("[")[0].partition(".")
            if name in UNSIGNED and part == "codes":
                value.copy_(torch.randint(0, 256, value.shape, generator=generator))
            elif name in UNSIGNED and part == "scales":
                value.copy_(1e-6 * torch.rand(value.shape, generator=generator) + 1e-7)
    return saved
