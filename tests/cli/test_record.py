"""`gradfold record`: exit codes, messages, and what is left on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradfold.cli import main as command_line
from gradfold.cli.main import main
from gradfold.provenance import canonical_bytes, read_document
from tests.provenance.makers import FOLDER, bundle_of, event, record_event, signer

BUNDLE, STATE = FOLDER / "forge_bundle.json", FOLDER / "chunkft_state.json"
REPORTED = ("--claim", "It folds.", "--as-reported")
RESULT = Path(__file__).parents[1] / "fixtures" / "results" / "step_time.json"


@pytest.fixture
def record(capsys, tmp_path, monkeypatch):
    """Call `gradfold record` in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        capsys.readouterr()
        code = main(["record", *(str(word) for word in words)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call


@pytest.fixture
def key(record):
    assert record("keygen", "-o", "k.pem", "--signer-id", "ada")[0] == 0
    return "k.pem"


def test_the_published_documents_verify(record):
    code, out, err = record("verify", BUNDLE, STATE)
    assert (code, err) == (0, "")
    assert "bundle  verified" in out and "state  verified; 2 events stand on the state's word alone" in out
    assert "not-checked" in out and "snapshot_sha256" in out
    code, out, _ = record("verify", "--json", BUNDLE)
    found = json.loads(out)
    assert code == 0 and found["verified"] and found["files"][0]["counts"]["fail"] == 0
    assert len(found["files"][0]["checks"]) > 100
    assert record("verify", "--all", BUNDLE)[1].count("\n") > 100


def test_exit_codes(record, tmp_path):
    document = read_document(BUNDLE)
    document["events"][1]["payload"]["verdict_id"] = 1
    (tmp_path / "bad.json").write_bytes(canonical_bytes(document))
    (tmp_path / "none.json").write_text("{}")
    code, out, err = record("verify", BUNDLE, "bad.json")
    assert code == 1 and err == "" and "failed " in out and "content_sha256" in out
    said = " ".join(out.split("bad.json")[1].split())
    assert said.startswith("bundle event 2 was changed after signing (failed ")
    code, out, err = record("verify", "none.json", "missing.json", "bad.json", BUNDLE)
    assert code == 2
    assert err == (
        "gradfold: none.json: is no open-graph bundle, state or event\ngradfold: missing.json: no such file\n"
    )
    assert "bad.json" in out and str(BUNDLE) in out  # the others are verified all the same
    code, out, _ = record("verify", "--json", "none.json", BUNDLE)
    assert code == 2 and [found["verified"] for found in json.loads(out)["files"]] == [False, True]


def test_a_replication_from_a_key_to_a_merged_state(record, key):
    code, out, err = record(
        "replicate", "--paper", BUNDLE, "--result", RESULT, "--key", key, "-o", "b.json", "--revision", "0f", *REPORTED
    )
    assert (code, err) == (0, "") and "gradfold record verify --trust-key k.pem.pub b.json" in out
    assert record("verify", "--trust-key", "k.pem.pub", "b.json")[0] == 0
    code, out, _ = record("verify", "b.json")
    assert code == 1 and "valid signature, untrusted key" in out
    code, out, _ = record("merge", "b.json", BUNDLE, "-o", "one.json")
    assert code == 0 and "one.json: 3 events, state_sha256" in out
    assert record("merge", BUNDLE, "b.json", BUNDLE, "one.json", "-o", "two.json")[0] == 0
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()
    state = read_document("one.json")
    assert state["applied_event_ids"][:2] == read_document(BUNDLE)["state"]["applied_event_ids"]
    code, out, _ = record("verify", "--trust-key", "k.pem.pub", "one.json")  # its signature is in b.json only
    assert code == 1 and "unsigned claim in the registry's name" in " ".join(out.split())
    code, out, _ = record("show", "b.json", "--trust-key", "k.pem.pub")
    assert code == 0 and "FORGE: Fused On-Register" in out and "replication record" in out and "ada" in out


def git(*words):
    names = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *names, *words], check=True, capture_output=True, text=True).stdout.strip()


CHANGES = {
    "nothing": ({}, None),
    "committed since": ({}, None),
    "another revision": ({"revision": "f" * 40}, "was made by revision ffffffffffff, and this is"),
    "a changed tree": ({"revision": "HEAD-dirty"}, "-dirty, and this is"),
    "no revision": ({"revision": None}, "does not say which revision made it"),
    "the code has changed since": ({}, "was made by revision"),
    "another processor": ({"machine.cpu": "Z80"}, "was made where cpu is 'Z80', and here it is"),
    "another number of cores": ({"machine.cores": 4096}, "was made where cores is '4096'"),
    "no machine": ({"machine": {}}, "does not say on which machine"),
    "no processor": ({"machine": {"cores": 2}}, "does not say on which processor"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_an_own_result_is_independent(record, key, tmp_path, change):
    from gradfold._machine import machine_facts

    changes, refused = CHANGES[change]
    Path("code.py").write_text("1")
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-qm", "x")
    result = {"benchmark": "b", "command": "c", "rows": [{"step_ms": 1.5}], "revision": git("rev-parse", "HEAD")}
    result["machine"] = machine_facts() | {"torch": "2.13"}
    for name, value in changes.items():
        inner = result["machine"] if name.startswith("machine.") else result
        inner[name.rpartition(".")[2]] = (
            value.replace("HEAD", result["revision"]) if name == "revision" and value else value
        )
    if result["revision"] is None:
        del result["revision"]
    Path("r.json").write_text(json.dumps(result))
    if "since" in change:
        place = Path("code.py" if "code" in change else "benchmarks/results/r.json")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("2")
        git("add", str(place))
        git("commit", "-qm", "y")
    words = ["--paper", BUNDLE, "--result", "r.json", "--key", key, "-o", "b.json", "--claim", "It folds."]
    code, _, err = record("replicate", *words)
    if refused:
        assert code == 2 and refused in err and "--as-reported" in err and not Path("b.json").exists()
        words += ["--as-reported", *(["--revision", "0f"] if change == "no revision" else [])]
        code, _, err = record("replicate", *words)
    assert (code, err) == (0, "")
    made = read_document("b.json")["events"][-1]
    standing = "as_reported" if refused else "independent"
    assert made["payload"]["replication_record"]["standing"] == standing
    assert made["signer"]["signer_type"] == standing.replace("_", "-")
    assert record("verify", "--trust-key", "k.pem.pub", "b.json")[0] == 0


def test_a_paper_known_by_its_state_only(record, key):
    words = [
        "--result",
        RESULT,
        "--key",
        key,
        "-o",
        "b.json",
        "--claim",
        "Working sets were tried.",
        "--revision",
        "0f",
        "--as-reported",
    ]
    assert record("replicate", "--paper", STATE, *words)[0] == 0
    assert record("verify", "--trust-key", "k.pem.pub", "b.json")[0] == 0
    assert record("merge", "b.json", STATE, "-o", "s.json")[0] == 0
    code, out, _ = record("show", "s.json")
    assert code == 1 and "ChunkFT" in out and "Working sets were tried." in out and "signed_event fails" in out


def test_show(record):
    code, out, _ = record("show", BUNDLE)
    assert code == 0
    for text in ("FORGE: Fused", "Aik Beng Ng", "pith:2026:GWT7BTE6QQH6QFVV76TWP23RSF", "2606.22932v1", "pith.science"):
        assert text in out
    code, out, _ = record("show", "--json", STATE)
    card = json.loads(out)
    assert card["aliases"]["doi"] == "10.48550/arxiv.2605.21177" and card["verified"]
    assert [found["type"] for found in card["events"]] == ["record_created", "graph_snapshot"]


def test_show_obeys_no_escapes(record, tmp_path):
    document = read_document(STATE)
    paper = document["current"]["graph_snapshots"][0]["payload"]["graph_snapshot"]["paper"]
    paper["title"], paper["authors_text"] = "\x1b[2J[bold red]x[/bold red]\x07", "a\u202eb\r\n"
    (tmp_path / "s.json").write_bytes(canonical_bytes(document))
    code, out, _ = record("show", "s.json")
    assert code == 1
    assert not set(out) & set("\x1b\x07\u202e\r") and "[bold red]x[/bold red]" in out


def test_merging_says_what_it_set_aside(record, tmp_path):
    ada = signer("ada", 1)
    events = [record_event(ada), event(ada, {"n": 1}), event(ada, {"n": 2}), None]
    (tmp_path / "b.json").write_bytes(canonical_bytes(bundle_of(ada, events)))
    code, out, _ = record("merge", "b.json", "-o", "s.json")
    assert code == 0 and "set aside: " in out and "fails structure" in out and "equivocation by key" in out
    code, out, _ = record("merge", "b.json", "-o", "s.json", "--json")
    assert json.loads(out)["invalid_events"] == read_document("s.json")["invalid_events"]
    (tmp_path / "e.json").write_bytes(canonical_bytes(events[1]))
    assert "fails key" in record("merge", "e.json", "-o", "t.json")[1]
    (tmp_path / "ada.json").write_text(json.dumps(ada.public.as_entry()))
    assert "fails" not in record("merge", "e.json", "-o", "t.json", "--trust-key", "ada.json")[1]


def test_sign(record, key, tmp_path):
    (tmp_path / "p.json").write_text('{"note": "checked"}')
    words = ["--key", key, "-o", "b.json"]
    event_words = ["--type", "correction", "--target", "title", "--payload", "p.json"]
    assert record("sign", BUNDLE, *words, *event_words, "--mirror", "https://example.org/b.json")[0] == 0
    assert record("verify", "b.json", "--trust-key", "k.pem.pub")[0] == 0
    first = read_document("b.json")["events"][-1]
    assert (first["event_type"], first["payload"]) == ("correction", {"note": "checked"})
    assert read_document("b.json")["mirror_hints"][-1]["bundle_url"] == "https://example.org/b.json"
    assert record("sign", "b.json", *words, *event_words, "--supersedes", first["event_id"])[0] == 0  # onto itself
    last = read_document("b.json")["events"][-1]
    assert (last["supersedes"], last["prev_event"]) == ([first["event_id"]], first["event_id"])
    assert record("sign", "b.json", "--key", key, "-o", "c.json")[0] == 0
    assert len(read_document("c.json")["events"]) == 4


def test_keys_with_a_passphrase(record, tmp_path, monkeypatch):
    (tmp_path / "word").write_text("open sesame\n")
    assert record("keygen", "-o", "k.pem", "--passphrase-file", "word")[0] == 0
    assert oct(os.stat("k.pem").st_mode)[-3:] == "600"
    words = ["sign", BUNDLE, "--key", "k.pem", "-o", "b.json"]
    code, _, err = record(*words)
    assert (code, err) == (2, "gradfold: k.pem: has a passphrase; give it with --passphrase-file FILE\n")
    assert record(*words, "--passphrase-file", "word")[0] == 0
    (tmp_path / "word").write_text("open barley\n")
    assert "with this passphrase" in record(*words, "--passphrase-file", "word")[2]


BAD = {
    "no such action": (["sing"], "invalid choice: 'sing'"),
    "no file": (["verify"], "the following arguments are required: FILE; see gradfold record verify --help"),
    "an unknown option": (["verify", "--josn", "x"], "unrecognized arguments: --josn"),
    "an option cut short": (["verify", "--js", "x"], "unrecognized arguments: --js"),
    "a file without JSON": (["show", "empty"], "empty: is empty"),
    "a file that is no document": (["show", "list"], "list: holds no JSON object, so no open-graph document"),
    "an object that is no document": (["show", "object"], "object: is no open-graph bundle, state or event"),
    "a folder": (["show", "."], ".: is a folder; name a file"),
    "bytes": (["show", "bytes"], "bytes: is not UTF-8 (byte 0)"),
    "depth": (["show", "deep"], "deep: is nested deeper than 100 levels"),
    "papers that differ": (["merge", BUNDLE, STATE, "-o", "out"], "2026:EH4GZG7XGWF4DMCCJSKTRY62GS, another paper"),
    "an outcome that is none": (
        ["replicate", "--paper", BUNDLE, "--result", RESULT, "--key", "k.pem", "-o", "out", "--outcome", "success"],
        "--outcome = 'success': takes replication, falsification, formal_bridge",
    ),
    "a relation that is none": (
        ["cite", "--paper", BUNDLE, "--citing", "x", "--key", "k.pem", "-o", "out", "--relation", "likes"],
        "--relation = 'likes': takes supports, refutes, extends, uses_method, depends_on, replaces, compares, cites",
    ),
    "no relation": (["cite", "--paper", BUNDLE, "--citing", "x", "--key", "k.pem", "-o", "out"], "--relation"),
    "a state in no folder": (["merge", BUNDLE, "-o", "none/out"], "none/out: there is no folder"),
    "no key file": (["sign", BUNDLE, "--key", "none", "-o", "out"], "none: no such file"),
    "a key that is none": (["sign", BUNDLE, "--key", "empty", "-o", "out"], "empty: is not a private PEM key"),
    "half an event": (
        ["sign", BUNDLE, "--key", "k.pem", "-o", "out", "--type", "correction"],
        "an event takes --type, --target and --payload",
    ),
    "an event type that is none": (
        ["sign", BUNDLE, "--key", "k.pem", "-o", "out", "--type", "gossip"],
        "argument --type: invalid choice: 'gossip'",
    ),
    "no claim": (
        ["replicate", "--paper", BUNDLE, "--result", RESULT, "--key", "k.pem", "-o", "out", "--as-reported"],
        "--claim: say in one sentence what was replicated",
    ),
    "a result of another revision": (
        ["replicate", "--paper", BUNDLE, "--result", RESULT, "--key", "k.pem", "-o", "out", "--claim", "It folds."],
        "step_time.json: was made by revision 97a3c2f6a3d8",
    ),
    "a result without a command": (
        ["replicate", "--paper", BUNDLE, "--result", "object", "--key", "k.pem", "-o", "out", *REPORTED],
        "object: names no `command`; say how it was made with --command",
    ),
    "a trusted file that holds no key": (["verify", BUNDLE, "--trust-key", "object"], "object: key 1: key_id has no"),
    "a bundle as a trusted file": (["verify", BUNDLE, "--trust-key", BUNDLE], "the keys in a bundle are only claims"),
    "a key that exists": (["keygen", "-o", "k.pem"], "k.pem.pub: exists already"),
    "a name that cannot be shown": (["keygen", "-o", "l.pem", "--signer-id", "\x1b"], "takes up to 200 printable"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(record, key, tmp_path, what):
    for name, data in (("empty", b""), ("list", b"[]"), ("object", b"{}"), ("bytes", b"\xff"), ("deep", b"[" * 10**6)):
        (tmp_path / name).write_bytes(data)
    before = sorted(os.listdir(tmp_path))
    words, message = BAD[what]
    code, out, err = record(*words)
    assert message in err
    assert (code, out) == (2, "")
    assert err.startswith("gradfold: ") and err.count("\n") == 1 and "\x1b" not in err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_paper_that_fails_is_not_built_on(record, key, tmp_path):
    document = read_document(BUNDLE)
    document["built_at"] = "2026-01-01T00:00:00Z"
    (tmp_path / "bad.json").write_bytes(canonical_bytes(document))
    code, _, err = record("sign", "bad.json", "--key", key, "-o", "out.json")
    assert code == 1 and err.startswith("gradfold: bad.json: the paper's bundle is not verified: bundle bundle_sha256")
    assert not Path("out.json").exists()


@pytest.mark.parametrize("outcome", [None, "replication", "falsification", "formal_bridge", "formal-bridge"])
def test_the_outcome_of_a_replication(record, key, outcome):
    words = ["--paper", BUNDLE, "--result", RESULT, "--key", key, "--revision", "0f", "-o", "b.json", *REPORTED]
    assert record("replicate", *words, *([] if outcome is None else ["--outcome", outcome]))[0] == 0
    found = read_document("b.json")["events"][-1]["payload"]["replication_record"]["outcome"]
    assert found == (outcome or "replication").replace("-", "_")
    code, out, _ = record("show", "b.json", "--trust-key", "k.pem.pub")
    assert code == 0 and found.replace("_", " ") in out


@pytest.mark.parametrize(
    "relation", ["supports", "refutes", "extends", "uses_method", "depends_on", "replaces", "compares", "cites"]
)
def test_a_citation(record, key, relation):
    words = ["--paper", BUNDLE, "--citing", "hep-lat/0305021", "--key", key, "-o", "b.json"]
    assert record("cite", *words, "--relation", relation, "--claim", "It folds.")[0] == 0
    made = read_document("b.json")["events"][-1]
    assert made["event_type"] == "citation_signature" and made["target"] == "citation:hep-lat/0305021"
    assert made["payload"]["citation"]["relation"] == relation
    assert record("verify", "--trust-key", "k.pem.pub", "--require-signed-events", "b.json")[0] == 0
    code, out, _ = record("show", "b.json", "--trust-key", "k.pem.pub")
    assert code == 0 and f"hep-lat/0305021 {relation.replace('_', ' ')}" in out and "It folds." in out


def test_signed_events_may_be_required(record, key):
    required = "--require-signed-events"
    assert record("verify", BUNDLE, required)[0] == 0
    assert record("verify", STATE)[0] == 0
    code, out, _ = record("verify", STATE, required)
    assert code == 1 and "signed_event" in out
    assert record("show", STATE, required)[0] == 1
    before = sorted(os.listdir())
    for words in (
        ["merge", STATE],
        ["sign", STATE, "--key", key],
        ["replicate", "--paper", STATE, "--result", RESULT, "--key", key, "--revision", "0f", *REPORTED],
        ["cite", "--paper", STATE, "--citing", "x", "--relation", "cites", "--key", key],
    ):
        code, _, err = record(*words, required, "-o", "out.json")
        assert code == 1 and "signature" in err and err.count("\n") == 1
    assert sorted(os.listdir()) == before
    assert record("merge", BUNDLE, required, "-o", "out.json")[0] == 0


def test_a_key_is_trusted_for_what_it_signs_or_as_a_registry(record, key):
    """A record of one's own making, with one's own receipt."""
    from gradfold.provenance import load_signer

    made = record_event(load_signer(key))
    Path("e.json").write_bytes(canonical_bytes(made))
    code, out, _ = record("verify", "e.json", "--trust-key", "k.pem.pub")
    assert code == 1 and "only a registry creates records" in " ".join(out.split())
    assert record("verify", "e.json", "--trust-registry", "k.pem.pub")[0] == 0
    code, out, _ = record("merge", "e.json", "--trust-key", "k.pem.pub", "-o", "s.json")
    assert code == 0 and "fails registry" in out


def test_help(record):
    code, out, _ = record("--help")
    assert code == 0 and all(action in out for action in ("verify", "show", "merge", "keygen", "sign", "replicate"))
    assert record()[0] == 2
    for action in ("verify", "show", "merge", "keygen", "sign", "replicate", "cite"):
        assert record(action, "--help")[0] == 0


@pytest.mark.parametrize("package", ["cryptography", "rich"])
def test_a_package_that_is_missing_is_named(monkeypatch, capsys, package):
    for name in list(sys.modules):
        if name.startswith(("gradfold.cli.record", "gradfold.provenance", package)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["record", "verify", "x"]) == 2
    said = capsys.readouterr().err
    assert said == f"gradfold: `gradfold record` needs {package}; run: pip install 'gradfold[record]'\n"


def test_the_other_commands_do_without(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert "record" in command_line.COMMANDS
    assert main(["--help"]) == 0 and "record" in capsys.readouterr().out


def test_a_process_of_its_own_loads_neither_torch_nor_transformers():
    """The package imports nothing of gradfold, and the command nothing heavy."""
    code = (
        "import sys; from gradfold.cli.main import main; code = main(['record', 'verify', sys.argv[1]]);"
        "print([name for name in ('torch', 'transformers', 'tyro', 'numpy') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(BUNDLE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
