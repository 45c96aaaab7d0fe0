"""Replication records from results of this repository's benchmarks."""

import json
import subprocess
from pathlib import Path

import pytest

from gradfold.provenance import ProvenanceError, append, merge, replication_payload, verify
from gradfold.provenance.replicate import unit_in_name

RESULTS = Path(__file__).parents[1] / "fixtures" / "results"
GIVEN = {"revision": "0123abc"}


def test_a_result_of_this_repository(bundle, ada, trusting):
    path = RESULTS / "step_time.json"
    result = json.loads(path.read_bytes())
    target, payload = replication_payload(bundle, path, **GIVEN)
    record = payload["replication_record"]
    assert target == "replication:step_time"
    assert record["pith_number"] == bundle["pith_number"]
    assert record["command"] == result["command"] and record["environment"] == result["machine"]
    assert record["code"] == {"revision": "0123abc", "known_from": "the signer"}
    assert "FORGE" in record["claim"]
    (row,) = record["results"]
    ratio = {"name": "ratio_median", "value": result["rows"][0]["ratio_median"], "unit": "1"}
    assert ratio in row["figures"]
    assert {figure["unit"] for figure in row["figures"]} == {"ms", "1", "nats per token"}
    assert row["conditions"]["tokens"] == 256
    (artifact,) = record["artifacts"]
    assert artifact["name"] == "step_time.json" and artifact["bytes"] == path.stat().st_size
    own = append(bundle, ada, "replication_record", target, payload)
    assert verify(own, trusting).verified
    state = merge([bundle, own])
    assert state["applied_event_ids"][:2] == bundle["state"]["applied_event_ids"]
    assert state["current"]["replication_records"][0]["payload"] == payload


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_makes_a_record(state, path):
    _, payload = replication_payload(state, path, command="python x.py", claim="c", **GIVEN)
    record = payload["replication_record"]
    assert all(figure["unit"] for row in record["results"] for figure in row["figures"])
    assert sum(len(row["figures"]) for row in record["results"]) >= 1


def test_a_result_that_names_no_command(state):
    with pytest.raises(ProvenanceError, match="names no `command`; say how it was made with --command"):
        replication_payload(state, RESULTS / "llama_8b_memory.json", **GIVEN)


def test_units():
    for path, unit in {
        "peak_bytes.plain": "bytes",
        "steps.folded.at_peak_bytes.weights": "bytes",
        "torch_ms_median": "ms",
        "ratio_quartile_1": "1",
        "folded_loss_after": "nats per token",
        "tokens": None,
        "parameters": None,
        "pairs": None,
        "seed": None,
        "items": None,
    }.items():
        assert unit_in_name(path) == unit, path


def test_the_revision_is_that_of_the_commit(state, tmp_path):
    def git(*words):
        names = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    path = tmp_path / "r.json"
    text = json.dumps({"benchmark": "b", "command": "c", "rows": [{"step_ms": 1.5}]})
    path.write_text(text)
    with pytest.raises(ProvenanceError, match="use --revision"):
        replication_payload(state, path)
    git("init", "-q")
    with pytest.raises(ProvenanceError, match="use --revision"):
        replication_payload(state, path)
    git("add", ".")
    git("commit", "-qm", "x")
    code = replication_payload(state, path)[1]["replication_record"]["code"]
    assert code == {"revision": git("rev-parse", "HEAD"), "known_from": "the commit that the result came with"}
    path.write_text(text + "\n")
    with pytest.raises(ProvenanceError, match="was changed since it was committed"):
        replication_payload(state, path)
    path.write_text(json.dumps({**json.loads(text), "revision": "abc"}))
    code = replication_payload(state, path)[1]["replication_record"]["code"]
    assert code == {"revision": "abc", "known_from": "the benchmark"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("[]", "is not a benchmark's result"),
        ('{"rows": [{"a_ms": NaN}], "command": "c"}', "holds NaN"),
        ('{"rows": 5, "command": "c"}', "`rows` is not a list"),
        ('{"rows": [5], "command": "c"}', "`rows` is not a list"),
        ('{"rows": [], "command": "c"}', "holds no figure"),
        ('{"rows": [{"x": 1}], "command": "c"}', "holds no figure"),
        ('{"rows": [{"x_ms": true}], "command": "c"}', "holds no figure"),
        ('{"rows": [{"x_ms": 1}], "command": 5}', "names no `command`"),
    ],
)
def test_results_that_cannot_be_used(state, tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ProvenanceError, match=message) as caught:
        replication_payload(state, path, **GIVEN)
    assert str(caught.value).startswith(str(path))
