"""Which rows there are, and what is refused, by row and field."""

import json

import pytest

from gradfold.train.errors import DataError
from gradfold.train.readers import read_rows
from gradfold.train.shapes import form_of, make_row
from tests.train.templates import turns

CHAT = turns("hi", "yes")


def row_of(fields):
    return make_row(fields, form_of(fields, "row"), "row")


def test_share_gpt_messages():
    call = {"name": "lamp", "arguments": {"on": True}}
    said = [("system", "be kind"), ("human", "hi"), ("function_call", json.dumps(call)), ("observation", "done"),
            ("gpt", "yes")]  # fmt: skip
    row = row_of({"conversations": [{"from": who, "value": what} for who, what in said]})
    assert row.shape == "messages"
    assert list(row.messages) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "yes"},
    ]
    assert row_of({"conversations": CHAT}).messages == tuple(CHAT)


def test_a_system_column_becomes_the_first_message():
    row = row_of({"messages": CHAT, "system": "be kind"})
    assert list(row.messages) == turns("hi", "yes", system="be kind")
    assert row.number(1) == 1  # messages are counted as they were given
    same = row_of({"messages": turns("hi", "yes", system="be kind"), "system": "be kind"})
    assert same.messages == row.messages and same.number(1) == 2
    assert row_of({"messages": CHAT, "system": ""}).messages == tuple(CHAT)


def test_columns_that_hold_something_are_kept():
    row = row_of({"text": "a", "label": 0, "note": None, "tags": [], "more": "", "of": {}})
    assert row.columns == {"label": 0}


def test_keys_without_a_value_are_no_keys():
    chat = [CHAT[0] | {"tool_calls": None, "name": None}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    assert list(row_of({"messages": chat}).messages) == [CHAT[0], {"role": "assistant", "tool_calls": [{}]}]


@pytest.mark.parametrize("value", [0, 0.0, False], ids=repr)
def test_marks_are_taken_out_of_the_messages(value):
    row = row_of({"messages": [CHAT[0], CHAT[1] | {"weight": value}]})
    assert row.messages == tuple(CHAT) and row.learn == (None, False)


REFUSED = {
    "a weight between": ({"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}]}, "message 2 has `weight` = 0.5; give 1"),
    "a weight above": ({"messages": [CHAT[0], CHAT[1] | {"loss_mask": 2}]}, "message 2 has `loss_mask` = 2"),
    "a weight that is text": ({"messages": [CHAT[0], CHAT[1] | {"train": "no"}]}, "message 2 has `train` = 'no'"),
    "a weight that is no number": ({"messages": [CHAT[0], CHAT[1] | {"weight": float("nan")}]}, "`weight` = nan"),
    "marks that say the opposite": (
        {"messages": [CHAT[0], CHAT[1] | {"weight": 1, "loss_mask": 0}]},
        "message 2: `weight` and `loss_mask` say the opposite",
    ),
    "a mark that is not clear": ({"messages": [CHAT[0], CHAT[1] | {"mask": 0}]}, "message 2: `mask` may mean either"),
    "an image": (
        {"messages": [CHAT[0] | {"content": [{"type": "text", "text": "what?"}, {"type": "image"}]}, CHAT[1]]},
        "message 1: `content` has a part of type 'image'",
    ),
    "an image by its address": (
        {"messages": [CHAT[0] | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, CHAT[1]]},
        "message 1: `content` has a part of type 'image_url'",
    ),
    "a part without text": ({"messages": [CHAT[0] | {"content": [{"type": "text"}]}, CHAT[1]]}, "part of type 'text'"),
    "parts that are words": ({"messages": [CHAT[0] | {"content": ["hi"]}, CHAT[1]]}, "has a part of type 'str'"),
    "a content that is an object": ({"messages": [CHAT[0], CHAT[1] | {"content": {"a": 1}}]}, "part of type 'object'"),
    "a content that is a number": ({"messages": [CHAT[0], CHAT[1] | {"content": 42}]}, "message 2: `content` is a int"),
    "a content that is null": ({"messages": [CHAT[0], CHAT[1] | {"content": None}]}, "message 2: `content` is null"),
    "calls that are no list": ({"messages": [CHAT[0], CHAT[1] | {"tool_calls": 3}]}, "message 2: `tool_calls` is not"),
    "an unknown speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1 is from 'narrator'"),
    "a call that is no JSON": ({"conversations": [{"from": "function_call", "value": "lamp"}]}, "`value` is text, but"),
    "a system beside a prompt": ({"prompt": "a", "completion": "b", "system": "c"}, "`system` beside a `prompt`"),
    "tools beside a prompt": ({"prompt": "a", "completion": "b", "tools": [{}]}, "`tools` beside a `prompt`"),
    "two systems": (
        {"messages": turns("hi", "yes", system="be kind"), "system": "be brief"},
        "has a `system` column and a system message that says something else",
    ),
    "a system that is a list": ({"messages": CHAT, "system": ["be kind"]}, "`system` is a list, not text"),
    "half messages, half text": ({"prompt": CHAT[:1], "completion": "yes"}, "`completion` is a str, but `prompt` a"),
    "half text, half messages": ({"prompt": "hi", "completion": CHAT[1:]}, "`completion` is a list, not text"),
    "no completion": ({"prompt": CHAT[:1], "completion": []}, "`completion` is not a list of messages"),
    "half a pair in a text": ({"text": "ok \ud83d"}, r"`text` holds half of a surrogate pair, \\ud83d, at character 4"),
    "half a pair in a prompt": ({"prompt": "\udc00", "completion": "b"}, "`prompt` holds half of a surrogate pair"),
    "half a pair in a content": ({"messages": [CHAT[0] | {"content": "a\ud83d"}, CHAT[1]]}, "message 1 holds half"),
    "half a pair in a part": (
        {"messages": [CHAT[0] | {"content": [{"type": "text", "text": "\udfff"}]}, CHAT[1]]},
        "message 1 holds half of a",
    ),
    "half a pair in a call": (
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"function": {"arguments": {"\ud83d": 1}}}]}]},
        "message 2 holds half of a",
    ),
    "half a pair in a system": ({"messages": CHAT, "system": "\ud83d"}, "`system` holds half of a"),
    "half a pair from ShareGPT": ({"conversations": [{"from": "gpt", "value": "\ud83d"}]}, "message 1 holds half of a"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_is_refused(what):
    fields, message = REFUSED[what]
    with pytest.raises(DataError, match="^row: .*" + message.replace("(", r"\(").replace("[", r"\[")):
        row_of(fields)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    content = {"txt": "the cat", "csv": "text\nthe cat\n", "json": '[{"text": "the cat"}]'}
    path.write_text(content.get(suffix, '\n{"text": "the cat"}\n'), encoding="utf-8-sig")
    assert [row.text for row in read_rows([str(path)])] == ["the cat"]


def test_messages_in_a_csv_file(tmp_path):
    quoted = json.dumps(CHAT).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{quoted}"\n', encoding="utf-8")
    assert [list(row.messages) for row in read_rows([str(tmp_path / "a.csv")])] == [CHAT]


def test_parquet_fills_nothing_into_messages(tmp_path):
    import pandas

    call = {"function": {"name": "lamp", "arguments": {"on": True}}}
    other = {"function": {"name": "fan", "arguments": {"speed": 2}}}
    chats = [[{"role": "assistant", "tool_calls": [call]}], [{"role": "assistant", "tool_calls": [other]}], CHAT]
    pandas.DataFrame({"messages": chats}).to_parquet(tmp_path / "a.parquet")
    assert [list(row.messages) for row in read_rows([str(tmp_path / "a.parquet")])] == chats
