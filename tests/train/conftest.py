"""A tiny model and data that every test of the trainer shares. Nothing here may reach a hub."""

import json
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

for package in ("transformers", "datasets", "tyro", "rich", "yaml"):
    pytest.importorskip(package)

from rich.console import Console  # noqa: E402

from gradfold.train import report  # noqa: E402
from gradfold.train.display import Display  # noqa: E402
from tests.train.parts import Parts  # noqa: E402
from tests.train.tiny import build_tokenizer, save_tiny, sentence  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def steady(tmp_path_factory):
    """Folder of the same without dropout: plain loops have none, and batches may be cut in any way."""
    return save_tiny(tmp_path_factory.mktemp("steady") / "llama", attention_dropout=0.0)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A JSONL file of 20 short texts."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": sentence(seed, 8 + seed)}) + "\n" for seed in range(20)), encoding="utf-8"
    )
    return path


@pytest.fixture
def silent():
    return Display(Console(quiet=True))


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs end without tracing and drawing, which take longer than all of their steps."""
    monkeypatch.setattr(report, "_trace_memory", lambda run, display: {})
    monkeypatch.setattr(report, "draw_loss", lambda records, path, name: None)


@pytest.fixture
def parts(tokenizer, tmp_path):
    return Parts(tokenizer, tmp_path / "checkpoints")
