"""Fold.report() and fold.working_set: the cut, whose turn it is, and where the bytes are."""

import torch
from torch import nn

import gradfold


def make(**options):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 8, bias=False))
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2, interval=2, **options))
    return model, optimizer, fold


def step(model, optimizer, fold):
    fold.backward(model(torch.arange(8)).pow(2).sum())
    optimizer.step()
    optimizer.zero_grad()


def test_before_and_after_a_turn():
    model, optimizer, fold = make(always=["2."], offload="cpu")
    report = fold.report()
    rows = {row.name: row for row in report.rows}
    assert rows["0.weight"].route == "folded" and rows["0.weight"].chunks == "0"
    assert rows["1.weight"].chunks == rows["1.bias"].chunks == "0, 1"  # a bias goes with its weight's rows
    assert rows["2.weight"].chunks == "always" and rows["2.weight"].route == "hooked"
    assert rows["3.weight"].route == "asleep" and rows["3.weight"].state_bytes == 0
    assert [(chunk.index, chunk.awake) for chunk in report.chunks] == [(0, True), (1, False)]
    assert report.chunks[0].last.startswith("1.bias[0:") and report.chunks[1].first.startswith("1.weight[")
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("2."))
    assert sum(chunk.bytes for chunk in report.chunks) == total * 12
    assert report.host_bytes == 0
    for _ in range(3):
        step(model, optimizer, fold)
    assert fold.working_set == gradfold.workset.Turn(chunk=1, chunks=2, step=1, interval=2)
    report = fold.report()
    rows = {row.name: row for row in report.rows}
    assert rows["0.weight"].route == "asleep" and rows["0.weight"].state_bytes == 8 * 8 * 4 + 4
    assert rows["3.weight"].route == "folded" and report.host_bytes > 0 and report.disk_bytes == 0
    printed = str(report)
    assert "working set: 2 chunks of 0.001 to 0.001 MiB, by bytes (out), forward, 2 steps each" in printed
    assert "prefetch 1" in printed and "awake" in printed and "0, 1" in printed


def test_without_one():
    model = nn.Linear(3, 3)
    fold = gradfold.fold(model, gradfold.SGD(model.parameters(), lr=0.1))
    report = fold.report()
    assert fold.working_set is None and not report.chunks and "working set" not in str(report)


def test_states_on_disk(tmp_path, capsys):
    model, optimizer, fold = make(offload="disk", folder=tmp_path / "states")
    for _ in range(2):
        step(model, optimizer, fold)
    report = fold.report()
    assert report.disk_bytes > 0 and "MiB on disk" in str(report)
    states = {row.name: row.state_bytes for row in report.rows}
    fold.remove()
    assert {p.requires_grad for p in model.parameters()} == {True}
    held = {name: sum(t.nbytes for t in optimizer.state[p].values()) for name, p in model.named_parameters()}
    assert held == states
