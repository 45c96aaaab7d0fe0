"""A resumed run goes on with the tokens it began with: of that day's date, or in the way of an earlier gradfold."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from gradfold.train import setup
from gradfold.train.checkpoint import TRAINER, list_checkpoints, read_checkpoint
from gradfold.train.data import prepare_data
from gradfold.train.errors import CheckpointError
from gradfold.train.loop import train
from tests.train.templates import turns
from tests.train.tiny import TEMPLATE, build_tokenizer, recipe, save_tiny

pytestmark = pytest.mark.usefixtures("no_pictures")

# to the microsecond, so that no two renderings are alike
DATED = "<|system|>{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}<eos>" + TEMPLATE


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"messages": turns("the cat", f"sat on {n} mats")}) + "\n" for n in range(8)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def model_with(folder, template):
    save_tiny(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def chosen(model, data, **fields):
    return recipe(model, data, sequence_length=64, checkpoint__interval_steps=3, evaluation__sample_tokens=0, **fields)


def weights(out):
    return load_file(list_checkpoints(out / "checkpoints")[-1] / "model.safetensors")


def goes_on(run, out, silent):
    """Resume `out` from its first checkpoint in a folder beside it: the weights must be the same at the end."""
    first = list_checkpoints(out / "checkpoints")[0]
    train(run, out.with_name("again"), read_checkpoint(first), silent)
    whole, again = weights(out), weights(out.with_name("again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    return json.loads((list_checkpoints(out.with_name("again") / "checkpoints")[-1] / TRAINER).read_text())["progress"]


def test_a_template_that_writes_the_date_is_told_that_of_the_run(chats, tmp_path, silent):
    model = model_with(tmp_path / "model", DATED)
    run = chosen(model, chats)
    train(run, tmp_path / "run", None, silent)
    progress = goes_on(run, tmp_path / "run", silent)
    assert progress["rendered_at"]


def test_all_rows_of_a_run_have_one_date(chats, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = DATED
    run = chosen(tmp_path, chats, text__held_out_data=(str(chats),), evaluation__sample_prompt="the dog")
    data = prepare_data(run, tokenizer)
    texts = [
        tokenizer.decode(data.tokens.ids[a:b].tolist()) for a, b in zip(data.tokens.starts, data.tokens.starts[1:])
    ]
    texts += [tokenizer.decode(data.held_out_tokens.ids.tolist()), tokenizer.decode(data.sample_ids)]
    assert len({text.partition("<eos>")[0] for text in texts}) == 1
    assert prepare_data(run, tokenizer).sha256 != data.sha256
    # and the clock goes on behind us
    assert tokenizer.apply_chat_template(turns("hi"), tokenize=False) != texts[0]
    assert "strftime" not in tokenizer.apply_chat_template(turns("hi"), tokenize=False)


def test_a_checkpoint_that_does_not_say_its_date(chats, tmp_path, silent):
    run = chosen(model_with(tmp_path / "model", DATED), chats)
    train(run, tmp_path / "run", None, silent)
    saved = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    saved.progress.rendered_at, saved.progress.encoding = "", 1
    with pytest.raises(CheckpointError, match=r"its chat template writes the date, and a checkpoint of gradfold 0\.1"):
        train(run, tmp_path / "again", saved, silent)
    assert not (tmp_path / "again").exists()


def test_a_run_of_0_1_keeps_its_tokens(chats, tmp_path, silent, monkeypatch):
    """There the line end behind an answer's end was learned too."""
    run = chosen(model_with(tmp_path / "model", TEMPLATE.replace("<eos>", "<eos>\n", 1)), chats)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "prepare_data", functools.partial(prepare_data, encoding=1))
        patch.setattr(setup, "ENCODING", 1)
        train(run, tmp_path / "run", None, silent)
    progress = goes_on(run, tmp_path / "run", silent)
    assert progress["encoding"] == 1
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<eos>", "<eos>\n{{ '' }}", 1)
    old, new = (prepare_data(run, tokenizer, encoding=encoding) for encoding in (1, 2))
    assert old.tokens.ids.tolist() == new.tokens.ids.tolist()
    assert int(old.tokens.learned.sum() - new.tokens.learned.sum()) == len(new.tokens)


def test_a_run_of_0_1_whose_tokens_are_the_same_goes_on_in_the_new_way(chats, tmp_path, silent):
    run = chosen(model_with(tmp_path / "model", TEMPLATE), chats)
    train(run, tmp_path / "run", None, silent)
    first = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    saved = read_checkpoint(first)
    saved.progress.encoding = 1
    train(run, tmp_path / "again", saved, silent)
    assert saved.progress.encoding == 2
