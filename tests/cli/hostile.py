"""Hostile command lines: files that are none, numbers that are no size, names that are no text. Data for two tests.

`PLACE` in a word stands for a folder that `furnish` fills.
"""

import json
import os
from pathlib import Path

SEEDS = Path(__file__).parents[1] / "provenance" / "seeds"
BUNDLE = str(SEEDS / "forge_bundle.json")
PLACE = "PLACE"
LONG = "x" * 5000
HALF = "\udcff"  # what a byte that is no UTF-8 becomes in a word of a command line
NINES = "9" * 30


def bomb(letter="a"):
    """Nine lists, each of nine times the one before: four hundred million words."""
    lines = [f"{letter}: &{letter} [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines) + "\n"


YAML = {
    "a list as a key": b"? [a, b]\n: 1\n",
    "a mapping as a key": b"? {a: 1}\n: 2\n",
    "a list as a key within a group": b"optimizer:\n  ? [lr]\n  : 1\n",
    "a null key": b"~: 1\n",
    "a number as a key": b"1: 2\n",
    "a NaN as a key": b".nan: 2\n",
    "a date as a key": b"2026-02-03: 2\n",
    "an impossible date as a key": b"2026-13-45: 1\n",
    "lists 3,000 deep": b"[" * 3000 + b"]" * 3000,
    "a value 3,000 deep": b"data: " + b"[" * 3000 + b"]" * 3000,
    "mappings 3,000 deep": b"{a: " * 3000 + b"1" + b"}" * 3000,
    "lines 3,000 deep": b"".join(b" " * n + b"a:\n" for n in range(3000)),
    "lists 3,000 deep, left open": b"[" * 3000,
    "a sequence 300 deep": b"data: " + b"[" * 300 + b"]" * 300,
    "an integer of 5,000 digits": b"steps: " + b"9" * 5000 + b"\n",
    "an integer of 400 digits for a fraction": b"optimizer: {lr: " + b"9" * 400 + b"}\n",
    "an octal number of 5,000 digits": b"steps: 0" + b"7" * 5000 + b"\n",
    "a hexadecimal number of 5,000 digits": b"steps: 0x" + b"f" * 5000 + b"\n",
    "thirty nines": b"steps: " + b"9" * 30 + b"\n",
    "thirty nines in base 60": b"steps: " + b":".join([b"59"] * 30) + b"\n",
    "an impossible date": b"steps: 2026-02-30\n",
    "an impossible time": b"steps: 2026-02-03T25:61:61Z\n",
    "a date": b"steps: 2026-02-03\n",
    "!!int x": b"steps: !!int x\n",
    "!!int of a list": b"steps: !!int [1]\n",
    "!!float x": b"optimizer: {lr: !!float x}\n",
    "!!bool x": b"fold: !!bool x\n",
    "!!null x": b"model: !!null x\n",
    "!!timestamp x": b"steps: !!timestamp x\n",
    "!!binary x": b"model: !!binary x\n",
    "!!binary of bytes": b"model: !!binary aGVsbG8=\n",
    "!!str of a list": b"model: !!str [a]\n",
    "!!seq of a word": b"data: !!seq x\n",
    "!!map of a word": b"optimizer: !!map x\n",
    "!!set": b"data: !!set {a, b}\n",
    "!!omap": b"data: !!omap [a: 1]\n",
    "!!omap of words": b"data: !!omap [a]\n",
    "!!pairs": b"data: !!pairs [a: 1]\n",
    "!!python/object/apply": b"model: !!python/object/apply:os.system ['touch hacked']\n",
    "!!python/name": b"model: !!python/name:os.system\n",
    "!!python/tuple": b"data: !!python/tuple [a]\n",
    "!!python/object/new": b"? !!python/object/new:os.system ['touch hacked']\n: 1\n",
    "a tag of one's own": b"model: !mine x\n",
    "an unknown alias": b"model: *mine\n",
    "a bomb of aliases": bomb().encode(),
    "a bomb of aliases as data": bomb().encode() + b"data: *i\n",
    "a bomb of aliases in its place": b"data: &a [x]\nmodel: &b [*a, *a]\nout: [*b, *b, *b]\n",
    "a list that holds itself": b"data: &a [*a]\n",
    "a mapping that holds itself": b"optimizer: &a {lr: *a}\n",
    "a group that holds itself": b"optimizer: &a\n  optimizer: *a\n",
    "a merge key of no mapping": b"<<: 5\n",
    "a key twice": b"steps: 1\nsteps: 2\n",
    "a key twice within a group": b"optimizer:\n  lr: 1\n  lr: 2\n",
    "a group twice": b"optimizer: {lr: 1}\noptimizer: {eps: 1}\n",
    "NUL bytes": b"model: a\0b\n",
    "only NUL bytes": b"\0" * 100,
    "a NUL in quotes": b'model: "a\\0b"\n',
    "control characters": b"model: a\x07\x1b[31mb\n",
    "an escape sequence in quotes": b'"\\e[2J\\e[31m": 1\n',
    "half a surrogate pair": b'model: "\\ud800"\n',
    "half a surrogate pair as a key": b'"\\ud800": 1\n',
    "half a surrogate pair in a list": b'data: ["a.txt", "\\udfff"]\n',
    "half a surrogate pair as bytes": b"model: \xed\xa0\x80\n",
    "bytes": bytes(range(256)) * 9,
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a zipped file": b"PK\x03\x04" + bytes(60),
    "UTF-16": "model: x\n".encode("utf-16"),
    "UTF-16 without a mark": "steps: 1\n".encode("utf-16-le"),
    "UTF-32": "steps: 1\n".encode("utf-32"),
    "Latin-1": "model: caf\u00e9\n".encode("latin-1"),
    "a byte order mark within": b"model: x\n\xef\xbb\xbfsteps: 1 1\n",
    "two documents": b"steps: 1\n---\nsteps: 2\n",
    "a list": b"- steps\n- 1\n",
    "a word": b"steps\n",
    "a number": b"42\n",
    "tabs": b"optimizer:\n\tlr: 1\n",
    "a quote left open": b'model: "x\n',
    "JSON cut short": b'{"steps": 1, ',
    "a null where a group has none": b"steps: [null]\n",
    "a list for a group": b"optimizer: [lr, 1]\n",
    "a word for a group": b"optimizer: AdamW\n",
    "a group in a field": b"steps: {a: {b: [1, {c: d}]}}\n",
    "a boolean for a number": b"steps: yes\n",
    "a number for a name": b"model: 5\n",
    "a fraction for a whole number": b"steps: 1.5\n",
    "NaN": b"optimizer: {lr: .nan}\n",
    "infinity": b"optimizer: {lr: .inf}\n",
    "minus infinity": b"gradient: {clip_norm: -.inf}\n",
    "NaN for a whole number": b"steps: .nan\n",
    "1e999": b"optimizer: {lr: 1.0e+999}\n",
    "1e999 as text": b"optimizer: {lr: 1e999}\n",
    "a key of 100,000 letters": b"x" * 100_000 + b": 1\n",
    "a value of 200,000 letters": b"optimizer: {name: " + b"x" * 200_000 + b"}\n",
    "two megabytes of comments": b"# nothing\n" * 200_000,
    "a name of many lines": b'model: "a\\nb\\nTraceback (most recent call last):\\n  c"\nsteps: [1]\n',
}
"""Name -> a recipe file that is refused, whatever else is asked for."""

HARMLESS = {
    "empty": b"",
    "only comments": b"# nothing\n\n",
    "a byte order mark": b"\xef\xbb\xbfsteps: 1\n",
    "an end mark": b"---\nsteps: 1\n...\n",
    "a group of nothing": b"optimizer:\n",
}
"""Files that look odd and say nothing wrong."""

INTEGERS = (
    "--steps", "--batch-size", "--sequence-length", "--seed", "--gradient.accumulate", "--optimizer.small-size",
    "--working-set.chunks", "--working-set.interval", "--working-set.prefetch", "--evaluation.interval-steps",
    "--evaluation.sequences", "--evaluation.sample-tokens", "--checkpoint.interval-steps", "--checkpoint.keep",
)  # fmt: skip
FRACTIONS = (
    "--epochs", "--text.held-out", "--optimizer.lr", "--optimizer.weight-decay", "--optimizer.eps",
    "--optimizer.momentum", "--optimizer.dampening", "--optimizer.alpha", "--optimizer.lr-decay",
    "--optimizer.initial-accumulator-value", "--optimizer.momentum-decay", "--gradient.clip-norm",
    "--gradient.clip-value", "--schedule.warmup", "--schedule.final",
)  # fmt: skip
NO_INTEGERS = ("nan", "inf", "1e12", "1.5", "-1", "", NINES, "1" * 5000, "1e999", "0x10", "\u00bd", "1 2")
NO_FRACTIONS = ("nan", "inf", "-inf", "1e999", "-1", "", "x", "1" * 5000, "1,5", "1e")

FILES = {
    "no file": f"{PLACE}/none",
    "a folder": f"{PLACE}/folder",
    "a pipe": f"{PLACE}/pipe",
    "/dev/zero": "/dev/zero",
    "a link to /dev/zero": f"{PLACE}/zero.jsonl",
    "a link to itself": f"{PLACE}/loop",
    "a link to nowhere": f"{PLACE}/nowhere",
    "a file in a file": f"{PLACE}/file/x",
    "5,000 letters": LONG,
    "5,000 letters in folders": "/".join(["y" * 99] * 50),
    "half a surrogate pair": f"{PLACE}/{HALF}",
    "nothing": "",
    "random bytes": f"{PLACE}/bytes",
}


def train_cases():
    """(name, words) of `gradfold train`, none of which needs a model that is there."""
    base = ["train", "--model", f"{PLACE}/model", "--data", f"{PLACE}/a.txt"]
    for flag in INTEGERS:
        for value in NO_INTEGERS:
            yield f"{flag} {value[:20]}", [*base, flag, value]
    for flag in FRACTIONS:
        for value in NO_FRACTIONS:
            yield f"{flag} {value[:20]}", [*base, flag, value]
    for flag, value in (
        ("--batch-size", "1000000000000"), ("--batch-size", "0"), ("--sequence-length", "1" + "0" * 20),
        ("--sequence-length", "1"), ("--sequence-length", "2147483647"), ("--batch-size", "2147483647"),
        ("--evaluation.sample-tokens", "2147483647"), ("--epochs", "1e300"), ("--epochs", "0"),
        ("--schedule.warmup", "1e300"), ("--schedule.warmup", "1.5"), ("--schedule.final", "2"),
        ("--text.held-out", "1"),
        ("--seed", str(2**32)), ("--optimizer.lr", "0"), ("--optimizer.lr", "1e300"), ("--gradient.clip-norm", "0"),
        ("--optimizer.name", "adamw"), ("--optimizer.name", LONG), ("--dtype", "float8"), ("--dtype", ""),
        ("--device", "cuda:" + NINES), ("--device", "meta"), ("--device", "banana"), ("--device", ""),
        ("--device", LONG), ("--device", "cpu:x"), ("--head", "None"), ("--fold", "maybe"), ("--text.packing", "2"),
        ("--text.too-long", "cut"), ("--working-set.order", "up"), ("--steps", "None None"),
    ):  # fmt: skip
        yield f"{flag} {value[:20] or 'nothing'}, a value out of range", [*base, flag, value]
    yield "--optimizer.betas of one", [*base, "--optimizer.betas", "0.9"]
    yield "--optimizer.betas of three", [*base, "--optimizer.betas", "0.9", "0.9", "0.9"]
    yield "--optimizer.betas nan", [*base, "--optimizer.betas", "nan", "0.9"]
    yield "--optimizer.betas of 1", [*base, "--optimizer.betas", "0.9", "1"]
    for flag in ("--model", "--data", "--config", "--resume", "--text.held-out-data"):
        for what, path in FILES.items():
            yield f"train {flag} {what}", ["train", flag, path]
    for what in ("a pipe", "a link to itself", "a file in a file", "5,000 letters", "5,000 letters in folders",
                 "half a surrogate pair", "nothing", "random bytes"):  # fmt: skip
        yield f"train --out {what}", [*base, "--out", FILES[what]]
    yield "train --out in /proc", [*base, "--out", "/proc/gradfold/out"]
    yield "a hub id of 5,000 letters", ["train", "--model", f"someone/{LONG}"]
    yield "a hub id with dots", ["train", "--model", "../.."]
    yield "an address for a model", ["train", "--model", "https://example.org/model"]
    yield "a home that is nobody's", ["train", "--model", "~nobody-here/x"]
    yield "a sample prompt of half a pair", [*base, "--evaluation.sample-prompt", HALF]
    yield "a NUL in the model's name", ["train", "--model", "a\0b"]
    yield "a NUL in the data's name", ["train", "--data", "a\0b.txt"]
    yield "a NUL in --out", [*base, "--out", "a\0b"]
    yield "a NUL in --config", ["train", "--config", "a\0b"]
    yield "a data file of an unknown kind", ["train", "--data", f"{PLACE}/bytes"]


def plan_cases():
    """(name, words) of `gradfold plan`, whose model is there."""
    base = ["plan", "--no-compare", "--model", f"{PLACE}/model"]
    for flag in ("--tokens", "--batch", "--sequence-length", "--batch-size"):
        for value in (
            "nan",
            "inf",
            "-1",
            "0",
            "1e12",
            NINES,
            "1" * 5000,
            "1" + "0" * 20,
            "1000000000000",
            "2147483647",
            "",
        ):
            yield f"plan {flag} {value[:20]}", [*base, flag, value]
    yield "plan of many tokens and batches", [*base, "--tokens", "100000", "--batch", "100000"]
    yield "plan of thirty nines of accumulation", [*base, "--gradient.accumulate", NINES]
    yield "plan of 2**31 batches", [*base, "--gradient.accumulate", str(2**31 - 1)]
    yield "plan of 2**31 chunks", [*base, "--working-set.chunks", str(2**31 - 1)]
    for value in ("nan", "inf", "-1", "0", "", "1e999GiB", "9" * 5000, "24 GiX", "GiB", "1_", "\u0663GiB",
          "0.0001", NINES + "TB",
                  "1e-3GiB", LONG, HALF):  # fmt: skip
        yield f"plan --budget {value[:20]!a}", [*base, "--budget", value]
    for value in ("x.gif", "", f"{PLACE}/none/x.png", f"{PLACE}/file/x.png", LONG + ".png", f"{PLACE}/folder.png",
          f"{PLACE}/pipe.png",
                  "/proc/x.png", HALF + ".png", "a\0b.png"):  # fmt: skip
        yield f"plan --plot {value[:20]!a}", ["plan", "--model", f"{PLACE}/model", "--plot", value]
    for flag in ("--model", "--config"):
        for what, path in FILES.items():
            yield f"plan {flag} {what}", ["plan", "--no-compare", flag, path]
    for name in ("config-list", "config-deep", "config-zero", "config-huge", "config-nan", "config-bytes",
          "config-kind",
                 "config-negative", "config-text"):  # fmt: skip
        yield f"plan of a model's {name}", ["plan", "--no-compare", "--model", f"{PLACE}/{name}"]
    yield "plan --device banana", [*base, "--device", "banana"]
    yield "plan --json maybe", [*base, "--json", "maybe"]
    yield "plan twice", [*base, "--tokens", "8", "--tokens", "9"]
    yield "plan in two words for one", [*base, "--tokens", "8", "--sequence-length", "8"]


def record_cases():
    """(name, words) of `gradfold record`."""
    key = ["--key", f"{PLACE}/k.pem", "-o", "out"]
    for what, path in FILES.items():
        for words in (
            ["verify", path], ["show", path], ["merge", path, "-o", "out"], ["verify", BUNDLE, "--trust-key", path],
            ["verify", BUNDLE, "--trust-registry", path], ["sign", BUNDLE, "--key", path, "-o", "out"],
            ["sign", path, *key], ["replicate", "--paper", path, "--result", f"{PLACE}/result.json", *key],
            ["replicate", "--paper", BUNDLE, "--result", path, *key],
            ["cite", "--paper", path, "--citing", "x", "--relation", "cites", *key],
            *([] if what == "random bytes" else [["sign", BUNDLE, *key, "--passphrase-file", path]]),
            ["sign", BUNDLE, *key, "--type", "correction", "--target", "t", "--payload", path],
        ):  # fmt: skip
            flag = next((word for before, word in zip(words[1:], words) if before == path), "")
            yield f"record {words[0]} {flag} {what}", ["record", *words]
        # Not onto devices: who runs this may be allowed to replace one.
        if what not in ("no file", "a link to nowhere", "random bytes", "/dev/zero", "a link to /dev/zero"):
            yield f"record merge -o {what}", ["record", "merge", BUNDLE, "-o", path]
            yield f"record keygen -o {what}", ["record", "keygen", "-o", path]
    for name in ("", " ", HALF, LONG, "a\nb", "\x1b[31m", "\u200b"):
        yield f"record keygen --signer-id {name[:20]!a}", ["record", "keygen", "-o", "k", "--signer-id", name]
        yield f"record sign --signer-id {name[:20]!a}", ["record", "sign", BUNDLE, *key, "--signer-id", name,
                                                         "--type", "correction", "--target", "t",
                                                         "--payload", f"{PLACE}/result.json"]  # fmt: skip
    for target in ("", "\u200b", HALF):
        yield f"record sign --target {target!a}", ["record", "sign", BUNDLE, *key, "--type", "correction",
                                                   "--target", target, "--payload", f"{PLACE}/result.json"]  # fmt: skip
    for link in ("x", "sha256:", LONG):
        yield f"record sign --supersedes {link[:20]}", ["record", "sign", BUNDLE, *key, "--type", "correction",
            "--target",
                                                        "t", "--payload", f"{PLACE}/result.json", "--supersedes",
                                                        link]  # fmt: skip
    for url in ("http://x", "https://", "https:///x", "x", "", "https://a b", f"https://{HALF}"):
        yield f"record sign --mirror {url!a}", ["record", "sign", BUNDLE, *key, "--mirror", url]
    yield "record cite nothing", ["record", "cite", "--paper", BUNDLE, "--citing", "", "--relation", "cites", *key]
    yield "record cite of no relation", ["record", "cite", "--paper", BUNDLE, "--citing", "x", "--relation", LONG, *key]
    yield "record replicate of no outcome", ["record", "replicate", "--paper", BUNDLE, "--result",
                                             f"{PLACE}/result.json", "--outcome", "", *key]  # fmt: skip
    yield "record verify nothing", ["record", "verify"]
    yield "record sing", ["record", "sing"]
    yield "record of nothing", ["record", ""]
    yield "record verify --trust-key nothing", ["record", "verify", BUNDLE, "--trust-key"]


def other_cases():
    """(name, words) that no command is found for, or none of its options."""
    for words in ([""], [" "], ["--bogus"], [LONG], [HALF], ["trian"], ["train", HALF], ["train", "train"],
          ["train", "-x"],
                  ["train", "--"], ["train", "---"], ["train", "--=1"], ["train", "--" + LONG], ["train", "--" + HALF],
                  ["train", "--steps"], ["train", "--steps="], ["train", "--steps=1=2"], ["train", "--steps", "1",
                  "--steps", "2"],
                  ["train", "--no-steps"], ["train", "--no-fold", "false"], ["train", "--optimizer", "x"],
                  ["train", "--optimizer.", "x"], ["train", "--.lr", "1"], ["train", "--lr", "1"], ["train",
                  "--config"],
                  ["train", "--config="], ["train", "--resume="], ["train", "--data"], ["train", "--data="],
                  ["plan", "--steps", "x"], ["plan", "--" + HALF], ["plan", "x"], ["plan", "--budget"], ["plan",
                  "--plot="],
                  ["record", "--bogus"], ["record", "verify", "--bogus", "x"], ["record", HALF], ["\0"]):  # fmt: skip
        yield " ".join(words).encode("ascii", "backslashreplace").decode()[:40] or "an empty word", words


def yaml_cases():
    """(name, words): each hostile recipe, to train and to plan."""
    for name in YAML:
        path = f"{PLACE}/yaml/{name.replace('/', '_')}"
        yield f"train, {name}", ["train", "--model", f"{PLACE}/model", "--data", f"{PLACE}/a.txt", "--config", path]
    for name in list(YAML)[::6]:
        yield f"plan, {name}", ["plan", "--no-compare", "--config", f"{PLACE}/yaml/{name.replace('/', '_')}"]


def all_cases():
    """Every (name, words), once."""
    found = {}
    for cases in (yaml_cases, train_cases, plan_cases, record_cases, other_cases):
        for name, words in cases():
            found[name if name not in found else f"{name} ({len(found)})"] = words
    return found


CONFIG = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def furnish(place: Path) -> None:
    """Put the files that the words name into a folder."""
    from gradfold.provenance import generate_key, new_signer

    for folder in ("folder", "folder.png", "yaml"):
        (place / folder).mkdir()
    for name, data in YAML.items():
        (place / "yaml" / name.replace("/", "_")).write_bytes(data)
    os.mkfifo(place / "pipe")
    (place / "zero.jsonl").symlink_to("/dev/zero")
    os.mkfifo(place / "pipe.png")
    (place / "loop").symlink_to(place / "loop")
    (place / "nowhere").symlink_to(place / "is" / "nothing")
    (place / "file").write_text("x")
    (place / "a.txt").write_text("some words to learn\n" * 9)
    (place / "bytes").write_bytes(bytes(range(256)))
    (place / "result.json").write_text(json.dumps({"benchmark": "b", "command": "c", "revision": "r", "step_ms": 1.0}))
    generate_key(place / "k.pem", new_signer("ada"))
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps(CONFIG))
    for name, data in {
        "config-list": "[]",
        "config-deep": "[" * 100_000,
        "config-huge": json.dumps({**CONFIG, "num_hidden_layers": 10**12}),
        "config-nan": json.dumps({**CONFIG, "hidden_size": float("nan")}),
        "config-negative": json.dumps({**CONFIG, "hidden_size": -64}),
        "config-text": json.dumps({**CONFIG, "hidden_size": "wide"}),
        "config-kind": json.dumps({"model_type": ["llama"]}),
        "config-bytes": "",
    }.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(data)
    (place / "config-bytes" / "config.json").write_bytes(b"\xff\xfe{")
    (place / "config-zero").mkdir()
    (place / "config-zero" / "config.json").symlink_to("/dev/zero")
