"""Rows as they are found: Alpaca's, preferences, and columns with other names; and the tokens of each."""

import json

import pytest

from gradfold.train.columns import renamed
from gradfold.train.errors import DataError, RecipeError
from gradfold.train.readers import read_rows
from gradfold.train.recipe import Recipe
from gradfold.train.recipe_file import dump_recipe, load_recipe
from gradfold.train.row_kinds import make_row
from gradfold.train.shapes import form_of
from gradfold.train.tokens import encode_rows
from tests.train.templates import turns
from tests.train.tiny import build_tokenizer

OPTIONS = {"loss_on": "completions", "too_long": "error", "limit": 200}
QUESTION = turns("hi", "x")[:1]
GOOD, BAD = ({"role": "assistant", "content": word} for word in ("yes", "no"))


def row_of(fields):
    return make_row(fields, form_of(fields, "row"), "row")


def texts(rows, tokenizer):
    """(all of it, what is learned) of each row of tokens."""
    tokens = encode_rows(rows, tokenizer, **OPTIONS)
    found = []
    for start, stop in zip(tokens.starts[:-1], tokens.starts[1:], strict=True):
        ids, learned = tokens.ids[start:stop], tokens.learned[start:stop]
        found.append((tokenizer.decode(ids), tokenizer.decode(ids[learned])))
    return found


ALPACA = {
    "plain": ({"instruction": "add", "output": "2"}, [("user", "add")]),
    "with an input": ({"instruction": "add", "input": "1 1", "output": "2"}, [("user", "add\n\n1 1")]),
    "an empty input": ({"instruction": "add", "input": "", "output": "2"}, [("user", "add")]),
    "a system": ({"instruction": "add", "output": "2", "system": "s"}, [("system", "s"), ("user", "add")]),
    "a history": (
        {"instruction": "add", "output": "2", "history": [["a", "b"]]},
        [("user", "a"), ("assistant", "b"), ("user", "add")],
    ),
}


@pytest.mark.parametrize("which", ALPACA)
def test_alpaca_is_a_chat(which, tokenizer):
    fields, before = ALPACA[which]
    row = row_of(fields)
    assert [(m["role"], m["content"]) for m in row.messages] == [*before, ("assistant", "2")]
    ((whole, learned),) = texts([row], tokenizer)
    assert whole.endswith("<|assistant|>2<eos>") and learned.endswith("2<eos>") and "add" not in learned


def test_alpaca_without_a_chat_template_is_plain_text():
    bare = build_tokenizer()
    bare.chat_template = None
    rows = [row_of({"instruction": "add", "input": "1", "output": "2"}), row_of({"prompt": "a", "completion": "b"})]
    (whole, learned), (other, _) = texts(rows, bare)
    assert whole == "### Instruction:\nadd\n\n1\n\n### Response:\n2<eos>" and learned == "2<eos>" and other == "ab<eos>"


PAIRS = {
    "text": ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, "hi", False),
    "messages": ({"prompt": QUESTION, "chosen": [GOOD], "rejected": [BAD]}, "hi", True),
    "one message": ({"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}, "hi", True),
    "whole chats": ({"chosen": [*QUESTION, GOOD], "rejected": [*QUESTION, BAD]}, "hi", True),
    "a prompt beside whole chats": (
        {"prompt": "hi", "chosen": [*QUESTION, GOOD], "rejected": [*QUESTION, BAD]}, "hi", True,
    ),
    "a prompt that is text": ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, "hi", True),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}}, "hi", True,
    ),
    "Alpaca": ({"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"}, "hi", True),
}  # fmt: skip


@pytest.mark.parametrize("which", PAIRS)
def test_preferences(which, tokenizer):
    fields, prompt, chat = PAIRS[which]
    row = row_of(fields)
    assert (
        row.shape == "preference" and [one.shape for one in row.pair] == (["messages"] if chat else ["completion"]) * 2
    )
    (good, learned_good), (bad, learned_bad) = texts([row], tokenizer)
    assert (learned_good, learned_bad) == ("yes<eos>", "no<eos>")
    assert good.removesuffix("yes<eos>") == bad.removesuffix("no<eos>") and prompt in good


def test_an_answer_that_is_the_prompt_s_last_turn_too(tokenizer):
    """Several turns: only the last answer is compared."""
    before = turns("hi", "yes", "and now")
    row = row_of({"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert [learned for _, learned in texts([row], tokenizer)] == ["yes<eos>", "no<eos>"]


def test_reference_columns(tokenizer):
    fields = {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1.5, "ref_rejected_logps": -2}
    tokens = encode_rows([row_of(fields)], tokenizer, **OPTIONS)
    assert tokens.reference.tolist() == [-1.5, -2.0]
    with pytest.raises(DataError, match="some rows say their log-probabilities"):
        encode_rows([row_of(fields), row_of({"prompt": "a", "chosen": "b", "rejected": "c"})], tokenizer, **OPTIONS)


def test_equal_answers_are_left_out(tokenizer):
    rows = [row_of({"prompt": "a", "chosen": "b", "rejected": rejected}) for rejected in ("b", "c")]
    tokens = encode_rows(rows, tokenizer, **OPTIONS)
    assert (len(tokens), tokens.skipped) == (2, 1)


@pytest.mark.parametrize(("too_long", "kept", "counts"), [("drop", 0, (1, 0)), ("truncate", 2, (0, 1))])
def test_a_pair_stays_together(too_long, kept, counts, tokenizer):
    row = row_of({"prompt": "a", "chosen": "b", "rejected": "c " * 90})
    tokens = encode_rows([row], tokenizer, loss_on="completions", too_long=too_long, limit=20)
    assert (len(tokens), tokens.dropped, tokens.truncated) == (kept, *counts)


REFUSED = {
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "are text, and there is no `prompt`"),
    "chats that begin otherwise": (
        {"chosen": turns("hi", "yes"), "rejected": turns("ho", "no")}, "begin otherwise, and there is no `prompt`",
    ),
    "a number": ({"prompt": "hi", "chosen": 1, "rejected": "no"}, "`chosen` is not a list of messages"),
    "null": ({"prompt": "hi", "chosen": None, "rejected": "no"}, "`chosen` is null"),
    "a system beside plain text": (
        {"prompt": "hi", "chosen": "yes", "rejected": "no", "system": "s"}, "`system` beside a `prompt`",
    ),
    "a probability": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": 0.5, "ref_rejected_logps": -1},
        "`ref_chosen_logps` = 0.5: give the sum of the answer",
    ),
    "half a reference": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -0.5}, "`ref_rejected_logps` = None",
    ),
    "an instruction that is a list": ({"instruction": ["a"], "output": "b"}, "`instruction` is a list, not text"),
    "an input that is a number": ({"instruction": "a", "input": 3, "output": "b"}, "`input` is a int, not text"),
    "a history that is text": ({"instruction": "a", "output": "b", "history": "c"}, "`history` is a str, not a list"),
    "half a turn": ({"instruction": "a", "output": "b", "history": [["c"]]}, "`history` entry 1 is not a question"),
    "half a pair of surrogates": ({"instruction": "a\ud83d", "output": "b"}, "`instruction` holds half of a"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_refused(which):
    fields, message = REFUSED[which]
    with pytest.raises(DataError, match="^row: ") as caught:
        row_of(fields)
    assert message in str(caught.value)


def test_preferences_beside_other_rows(tmp_path, tiny, tokenizer):
    from gradfold.train.data import prepare_data
    from tests.train.tiny import recipe

    rows = [{"prompt": "a", "completion": "b"}], [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    for name, part in zip(("a", "b"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    import dataclasses

    both = dataclasses.replace(recipe(tiny, tmp_path), data=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))
    with pytest.raises(DataError, match="b.jsonl line 1: preferences and other rows in one run"):
        prepare_data(both, tokenizer)


# ---- other names ---------------------------------------------------------------------------------------------------

NAMED = {
    "columns": (("prompt=q", "completion=a"), {"q": "x", "a": "y", "n": 1}, {"prompt": "x", "completion": "y", "n": 1}),
    "names in turn": (("text=body", "title=text"), {"text": "t", "body": "b"}, {"text": "b", "title": "t"}),
    "messages": (
        ("messages=log", "role=who", "content=what"),
        {"log": [{"who": "bot", "what": "x", "n": 1}]},
        {"messages": [{"role": "assistant", "content": "x", "n": 1}]},
    ),
    "both answers": (
        ("chosen=good", "rejected=bad", "role=who", "content=what"),
        {"good": [{"who": "user", "what": "x"}], "bad": [{"who": "user", "what": "y"}]},
        {"chosen": [{"role": "user", "content": "x"}], "rejected": [{"role": "user", "content": "y"}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", NAMED)
def test_columns(which):
    columns, fields, expected = NAMED[which]
    assert renamed(fields, columns, "row") == expected


def test_columns_that_are_not_there():
    with pytest.raises(DataError, match=r"row: has no `question`, which columns = prompt=question names; it has q, a"):
        renamed({"q": 1, "a": 2}, ("prompt=question",), "row")
    with pytest.raises(DataError, match="row: has `prompt` beside `q`"):
        renamed({"q": 1, "prompt": 2}, ("prompt=q",), "row")
    for columns, message in ((("prompt",), "give OURS=THEIRS"), (("a=b", "a=c"), "a is given twice")):
        with pytest.raises(RecipeError, match=message):
            Recipe(columns=columns)


def test_columns_from_a_file_and_on_the_command_line(tmp_path, tiny, capsys):
    from gradfold.cli.main import main

    (tmp_path / "r.yaml").write_text("model: m\ncolumns:\n  prompt: question\n  completion: answer\n")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.columns == ("prompt=question", "completion=answer")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    words = ["--model", str(tiny), "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["train", *words, "--columns", "prompt=question", "completion=reply"]) == 2
    assert "a.jsonl line 1: has no `reply`" in capsys.readouterr().err


def test_csv_with_other_names(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\nhi,yes\n")
    (row,) = read_rows([str(tmp_path / "a.csv")], ("prompt=q", "completion=a"))
    assert (row.prompt, row.completion) == ("hi", "yes")
