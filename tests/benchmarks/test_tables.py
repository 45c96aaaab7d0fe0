"""The tables of README and docs: what their scripts make of figures, and that the pages say what the files say."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import head, largest_models, parity, peers_methods, peers_table
from benchmarks.common import allocator_bytes, llama, llama_config, read_rows
from benchmarks.peers import CONTESTANTS, PeerUnavailable
from benchmarks.resumable import ResultFile

ROOT = Path(__file__).parents[2]
GIB = 2**30


# result files that grow row by row


def result_file(path):
    return ResultFile("some", path, ("model", "way"), card="24 GB")


def test_rows_are_kept_as_they_finish_and_not_made_again(tmp_path):
    path = tmp_path / "some.json"
    results = result_file(path)
    results.add({"model": "a", "way": "plain", "bytes": 1})
    assert json.loads(path.read_text())["card"] == "24 GB"
    again = result_file(path)
    assert again.find(model="a", way="plain")["bytes"] == 1
    assert again.find(model="a", way="folded") is None


def test_a_row_made_again_takes_the_place_of_the_old_one(tmp_path):
    results = result_file(tmp_path / "some.json")
    for size in (1, 2):
        results.add({"model": "a", "way": "plain", "bytes": size})
    results.add({"model": "b", "way": "plain", "bytes": 3})
    assert [row["bytes"] for row in result_file(tmp_path / "some.json").rows] == [2, 3]


def test_two_processes_fill_one_file(tmp_path):
    one, other = (result_file(tmp_path / "some.json") for _ in range(2))
    one.add({"model": "a", "way": "plain"})
    other.add({"model": "b", "way": "plain"})
    one.add({"model": "c", "way": "plain"})
    assert [row["model"] for row in result_file(tmp_path / "some.json").rows] == ["a", "b", "c"]


def test_every_row_says_by_what_it_was_made(tmp_path):
    results = result_file(tmp_path / "some.json")
    results.add({"model": "a", "way": "plain"})
    row = results.rows[0]
    assert row["command"] and "revision" in row


# the largest models


def plan_row(model, gib, way="every weight", tokens=1024, host=0.0):
    names = list(largest_models.NAMES)
    return {
        "model": model,
        "tokens": tokens,
        "way": way,
        "parameters": names.index(model),
        "device_bytes": int(gib * GIB),
        "host_bytes": int(host * GIB),
        "plan_command": "gradfold plan",
    }


@pytest.mark.parametrize(
    ("card", "model"),
    [(8, None), (12, "llama-3.2-1b"), (24, "llama-3.2-3b"), (32, "llama-3.2-3b"), (48, "llama-3.1-8b")],
)
def test_the_largest_is_that_of_most_parameters_that_leaves_the_margin(card, model):
    rows = [plan_row("llama-3.2-1b", 11.6), plan_row("llama-3.2-3b", 13.0), plan_row("llama-3.1-8b", 31.5)]
    rows += [plan_row("llama-2-13b", 1.0, tokens=4096), plan_row("qwen3-4b", 1.0), plan_row("llama-2-13b", 1, "BAdam")]
    found = largest_models.largest(rows, "Llama", card, 1024, "every weight")
    assert (found and found["model"]) == model


def test_a_cell_names_one_model_of_each_family_with_card_and_host_memory():
    rows = [plan_row("llama-3.1-8b", 16.25, "working set", host=15.2), plan_row("qwen3-8b", 17.0, "working set")]
    header, lines = largest_models.table(rows, 1024)
    cell = lines[largest_models.CARDS_GIB.index(24)][header.index("gradfold, working set")]
    assert cell == "Llama 8B (16.2 + 15.2 host); Qwen3 8B (17.0)"
    assert lines[0][header.index("gradfold, working set")] == "-"


def test_a_cell_says_so_where_a_larger_model_has_no_plan_yet():
    rows = [plan_row("llama-3.2-1b", 5.0), plan_row("llama-2-13b", 30.0, "BAdam"), plan_row("qwen3-32b", 70.0, "BAdam")]
    rows = [row | {"parameters": size} for row, size in zip(rows, (10**9, 13 * 10**9, 33 * 10**9), strict=True)]
    header, lines = largest_models.table(rows, 1024)
    cells = {line[0]: line[header.index("gradfold, every weight every step")] for line in lines}
    assert cells["48 GB"] == "Llama 1B (5.0)"  # 13B at 4.06 bytes each takes more
    assert cells["80 GB"] == "at least Llama 1B (5.0)"
    complete = [*rows, plan_row("llama-2-13b", 50.0) | {"parameters": 13 * 10**9}]
    assert largest_models.table(complete, 1024)[1][-1][1] == "Llama 13B (50.0)"


def test_what_cannot_fit_the_largest_card_is_not_planned():
    assert not largest_models.may_fit("llama-3.1-70b", "working set")
    assert largest_models.may_fit("qwen3-32b", "working set")
    assert not largest_models.may_fit("qwen3-32b", "every weight")


def test_every_plan_has_its_own_command():
    cells = [largest_models.Cell(m, t, w) for w in largest_models.WAYS for t in (1024, 4096) for m in ("qwen3-8b",)]
    commands = [cell.command for cell in cells if cell.way not in ("plain AdamW", "8-bit AdamW")]
    assert len(set(commands)) == len(commands)
    assert all(("--tokens 4096" in cell.command) == (cell.tokens == 4096) for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["every weight", "working set", "plain AdamW", "8-bit AdamW"])
def test_the_command_of_a_plan_says_the_same(way, capsys):
    from gradfold.cli.main import main

    cell = largest_models.Cell("qwen3-0.6b", 1024, way)
    row = largest_models.carry_out(cell)
    assert main([*cell.command.split()[1:], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    if way in said["label"] or way in ("every weight", "working set"):
        assert (said["device_bytes"], said["host_bytes"]) == (row["device_bytes"], row["host_bytes"])
    else:
        assert row["peak_bytes"] in [one["peak_bytes"] for one in said["compared_with"] if one["label"] == way]


def test_badam_keeps_copies_and_states_of_one_layer():
    pytest.importorskip("badam")
    from gradfold.planner.models import Subject

    config = llama_config(4, hidden=64, intermediate=128, vocabulary=256, heads=4)
    subject = Subject("small", config=config)
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    config.dtype = "bfloat16"
    with_one = largest_models.stored(subject, 16, "BAdam").peak_bytes
    weights = 2 * subject.parameters
    assert weights + 12 * layer < with_one < weights + 24 * layer


# long runs


def test_one_bit_of_one_weight_is_changed():
    model = llama(llama_config(1, hidden=16, intermediate=32, vocabulary=32, heads=2), torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    parity.change_last_bit(model)
    changed = [(a - b).abs() for a, b in zip(model.parameters(), before, strict=True)]
    assert sum(int((c > 0).sum()) for c in changed) == 1
    at = next(i for i, c in enumerate(changed) if c.any())
    old = before[at][changed[at] > 0].item()
    assert 0 < max(c.max().item() for c in changed) <= 2 * abs(old) * torch.finfo(torch.float32).eps


def parity_row(variant, seed, loss, curve=(3.0, 2.0)):
    return {"variant": variant, "seed": seed, "steps": 100, "held_out_loss": loss, "training_loss": list(curve)}


def test_differences_are_taken_within_a_seed():
    rows = [parity_row(parity.REFERENCE, 0, 1.0), parity_row(parity.REFERENCE, 1, 2.0, (4.0, 3.0))]
    rows += [parity_row("fp32 folded", 0, 1.5), parity_row("fp32 folded", 1, 1.75), parity_row("fp32 folded", 2, 9.0)]
    assert parity.above_reference(rows, "fp32 folded") == {0: 0.5, 1: -0.25}
    assert parity.curves(rows, "fp32 folded") == [[0.0, 0.0], [-1.0, -1.0]]
    lines = parity.table(rows)[1]
    folded = next(line for line in lines if line[0] == "fp32 folded")
    assert folded[1:2] + folded[3:] == ["2", "+0.1250", "0.5303", "-0.2500", "+0.5000"]


def test_means_over_windows_end_with_a_shorter_one():
    assert parity.window_means([1.0, 3.0, 5.0], 2) == [2.0, 5.0]


def test_a_run_of_torch_and_of_its_fold_in_fp32_agree(monkeypatch):
    monkeypatch.setitem(parity.MODEL, "hidden", 32)
    monkeypatch.setitem(parity.MODEL, "intermediate", 64)
    rows = [parity.carry_out(parity.Run(name, 0, 3)) for name in (parity.REFERENCE, "fp32 folded")]
    assert math.isclose(rows[0]["held_out_loss"], rows[1]["held_out_loss"], rel_tol=1e-5)
    assert rows[0]["held_out_loss"] != rows[1]["held_out_loss_of_weights"] or rows[0]["training_loss"]


# peers


def test_judged_methods_have_a_row_in_the_judges_table():
    assert {method.judged for method in peers_methods.METHODS.values()} - {None} <= set(CONTESTANTS)


def test_a_peer_that_is_missing_or_raises_says_so(monkeypatch):
    def refuse(model):
        raise ValueError("no such kernel")

    monkeypatch.setitem(peers_methods.METHODS, "missing", peers_methods.Method(refuse, "surely-not-installed"))
    monkeypatch.setitem(peers_methods.METHODS, "refuses", peers_methods.Method(refuse))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(PeerUnavailable, match="pip install --no-deps surely-not-installed"):
        peers_methods.attach("missing", model)
    with pytest.raises(PeerUnavailable, match="ValueError: no such kernel"):
        peers_methods.attach("refuses", model)


def test_the_table_of_peers_joins_memory_times_and_verdicts():
    def row(method, what, dtype, **figures):
        return {"method": method, "what": what, "dtype": dtype, "version": None, **figures}

    rows = [
        row("torch hooks", "memory", "bf16", peak_bytes_per_parameter=6.2),
        row("torch hooks", "time", "fp32", ratio_to_torch=1.1, ratio_to_floor=1.5),
        row("forward and backward alone", "time", "fp32", ratio_to_torch=0.8, ratio_to_floor=1.0),
        row("bitsandbytes 8-bit", "memory", "bf16", unavailable="no kernel"),
    ]
    judged = [{"contestant": "torch hooks", "accumulation": "no", "ties": "yes"}]
    header, lines = peers_table.table(rows, judged)
    by_name = {line[0]: dict(zip(header[1:-1], line[1:-1], strict=True)) for line in lines}
    assert by_name["torch hooks"]["bf16"] == "6.20"
    assert by_name["torch hooks"]["step / torch fused"] == "1.10"
    assert (by_name["torch hooks"]["accumulation"], by_name["torch hooks"]["ties"]) == ("no", "yes")
    assert (by_name["torch fused"]["step / torch fused"], by_name["torch fused"]["step / floor"]) == ("1.00", "1.25")
    assert next(line for line in lines if line[0] == "bitsandbytes 8-bit")[-1].endswith("no kernel")


@pytest.mark.parametrize("name", ["torch fused", "torch hooks", "gradfold", "gradfold, int8 states, head folded"])
def test_methods_that_need_no_package_take_a_step(name):
    config = llama_config(1, hidden=32, intermediate=64, vocabulary=64, heads=2)
    model = llama(config, torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    ids = torch.arange(8)[None]
    finish = peers_methods.attach(name, model)
    finish(model(input_ids=ids, labels=ids).loss)
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_allocator_events_tell_what_rests_and_the_peak():
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        kept = torch.zeros(2**20, dtype=torch.uint8)
        before = torch.zeros(2**24, dtype=torch.uint8)
        del before
        with torch.profiler.record_function("measured"):
            torch.zeros(2**21, dtype=torch.uint8)
            torch.zeros(2**21, dtype=torch.uint8)
    assert kept.nbytes == 2**20
    assert allocator_bytes(profiled, "measured") == (2**20, 2**20 + 2**21)


# heads


def tiny_head():
    shape = {"tokens": 12, "vocabulary": 300, "width": 32, "dtype": "fp32", "tied": False}
    return head.argparse.Namespace(**shape)


def test_heads_that_run_here_have_the_same_loss_and_gradients():
    args = tiny_head()
    found = {}
    for one in head.HEAD_VARIANTS:
        if one.fold or one.name in ("Liger", "CCE") or head.why_not(one, args):
            continue
        model = head.make_head(args)()
        loss = one.loss(model, head.hidden_batch(args))
        loss.backward()
        found[one.name] = (loss.detach(), model.head.weight.grad)
    assert "plain" in found
    for loss, grad in found.values():
        torch.testing.assert_close(loss, found["plain"][0])
        torch.testing.assert_close(grad, found["plain"][1])


def test_a_head_that_does_not_run_here_says_why():
    def refuse(model, batch):
        raise RuntimeError("no driver")

    args = tiny_head()
    assert head.why_not(head.HeadVariant("refuses", refuse, fold=False), args) == (
        "does not run here: RuntimeError: no driver"
    )
    assert head.why_not(head.HEAD_VARIANTS[0], args) is None


# what is published


def published(page, name):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {re.escape(name)} -->\n(.*?)\n<!-- end of {re.escape(name)} -->", text, re.DOTALL)
    return found[1].splitlines()[2:]


def lines_of(table):
    return ["| " + " | ".join(cells) + " |" for cells in table[1]]


def rows_of(name):
    return read_rows(ROOT / "benchmarks" / "results" / f"{name}.json")  # none where it was never run


@pytest.mark.parametrize("tokens", largest_models.TOKENS)
def test_the_page_of_the_largest_models_says_what_was_planned(tokens):
    rows = rows_of("largest_models")
    assert published("largest_models.md", f"{tokens} tokens") == lines_of(largest_models.table(rows, tokens))


def test_the_page_of_long_runs_says_what_was_run():
    assert published("parity.md", "parity") == lines_of(parity.table(rows_of("parity")))


def test_the_page_of_peers_says_what_was_measured():
    assert published("peers.md", "peers") == lines_of(peers_table.table(rows_of("peers"), rows_of("correctness")))
