"""The picture: drawn without a display, true to the figures, and every category visible where it has bytes."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import gradfold
from gradfold.planner.bytes import format_bytes
from gradfold.planner.plot import COLORS, _resampled, draw_step_memory
from gradfold.planner.step import step_memory

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def steps():
    def build():
        return nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(6)))

    def step(optimizer, fold):
        x = torch.ones(128, 512)
        return step_memory(build, optimizer, x, fold=fold, loss=lambda model, x: model(x).sum(), label=str(fold))

    return step(lambda p: torch.optim.AdamW(p, fused=True), False), step(gradfold.AdamW, True)


def share_of(image, color):
    """Part of the pixels that have a category's colour."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (np.abs(image[..., :3] - rgb).max(axis=-1) < 0.02).mean()


def test_png_shows_gradients_above_and_none_below(steps, tmp_path):
    import matplotlib.image

    path = tmp_path / "memory.png"
    draw_step_memory(*steps, path)
    image = matplotlib.image.imread(path)
    assert image.shape[1] >= 1400
    body = image[int(0.14 * len(image)) :]  # without title and legend
    above, below = body[: len(body) // 2], body[len(body) // 2 :]
    assert share_of(above, COLORS["gradients"]) > 0.02
    assert share_of(below, COLORS["gradients"]) == 0
    for category in ("weights", "states"):
        assert share_of(above, COLORS[category]) > 0.05
        # one scale: what stays is as large above as below
        assert share_of(above, COLORS[category]) == pytest.approx(share_of(below, COLORS[category]), rel=0.03)


def test_text_names_peaks_phases_and_budget(steps, tmp_path):
    from matplotlib import rc_context

    path = tmp_path / "memory.svg"
    with rc_context({"svg.fonttype": "none"}):
        draw_step_memory(*steps, path, title="A title & more", budget_bytes=32 << 20)
    text = re.sub(r"&amp;", "&", path.read_text(encoding="utf-8"))
    plain, folded = steps
    for expected in (
        "A title & more",
        f"peak {format_bytes(plain.peak_bytes)}",
        f"peak {format_bytes(folded.peak_bytes)}",
        "budget 32.0 MiB",
        "forward",
        "backward",
        "weights",
        "gradients",
        "MiB",
    ):
        assert expected in text, expected


@pytest.mark.parametrize("which", [0, 1])
def test_resampling_keeps_peak_start_and_end(steps, which):
    step = steps[which]
    x, live = _resampled(step.timeline)
    assert live.sum(axis=1).max() == step.peak_bytes
    assert live[0].sum() == step.resting_bytes
    assert (live[-1] == step.timeline.live_bytes[-1]).all()
    assert x[0] == 0 and x[-1] == 1 and (np.diff(x) >= 0).all()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10 * 2**20, "10.0 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (int(2.43 * 2**30), "2.43 GiB"),
        (134.4 * 2**30, "134 GiB"),
    ],
)
def test_format_bytes(nbytes, text):
    assert format_bytes(nbytes) == text


@pytest.mark.slow
def test_importing_the_planner_imports_no_optional_package():
    optional = "{'matplotlib', 'transformers', 'datasets'}"
    code = f"import sys, gradfold.planner.plot; print(sorted({optional} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
