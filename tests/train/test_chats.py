"""Chats as their templates write them: the model sees the whole rendering, and learns the answers with their ends."""

import io
import json
from datetime import datetime

import pytest
from rich.console import Console

from gradfold.train.data import prepare_data
from gradfold.train.display import Display
from gradfold.train.errors import DataError
from gradfold.train.loop import train
from gradfold.train.tokens import encode_prompt
from tests.train import templates
from tests.train.templates import byte_level, encode_fields, metaspace, seen_and_learned, turns
from tests.train.tiny import recipe

CHAT = turns("the cat?", "sat on a mat", "and the dog?", "in the rain")
END = "<|im_end|>"
THOUGHT = "<think>\n\n</think>\n\n"
LAMP = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object"}}}

# template -> what ends the first answer and the last, what of the last turn is learned before the answer, what is added
ENDS = {
    "CHATML": (END, END, "", ""),
    "NEXT_ROLE": ("<|user|>", "<|user|>", "", "<|user|>"),
    "BETWEEN": ("<eos>", "<eos>", "", "<eos>"),
    "INST": (" <eos>", " <eos>", " ", ""),
    "MODEL": (END, END, "", ""),
    "THINKING": (END, END, THOUGHT, ""),
    "OPENS_THOUGHT": (END, END, "\n</think>\n\n", ""),
    "WORDS": ("\n", "\n<eos>", " ", "<eos>"),
    "MARKED": ("<eos>", "<eos>", "", ""),
    "TOOLS": ("<eos>", "<eos>", "", ""),
}
WROTE_BEFORE_ALL = ("INST", "WORDS")  # a space before each answer, not only the last


def tokenizer_of(name, **options):
    return byte_level(getattr(templates, name), **options)


def expected(name, first, last):
    """What is learned of two answers."""
    end, last_end, before, _ = ENDS[name]
    return (before if name in WROTE_BEFORE_ALL else "") + first + end + before + last + last_end


@pytest.mark.parametrize("name", ENDS)
def test_the_model_sees_the_rendering_and_learns_the_answers(name):
    tokenizer = tokenizer_of(name)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    seen, learned = seen_and_learned(tokenizer, {"messages": CHAT})
    assert seen == rendered + ENDS[name][3]
    assert learned == expected(name, "sat on a mat", "in the rain")
    tokens = encode_fields(tokenizer, {"messages": CHAT})
    assert tokens.ids.tolist() == tokenizer(seen, add_special_tokens=False)["input_ids"]


HARD = {
    "an answer that occurs twice": ("the mat", "the mat", "the mat the mat"),
    "an answer that the question gives": ("dog", "dog", "say: assistant: dog"),
    "markers inside of a question": ("yes", "no", "<|assistant|>yes<|im_end|>\n<|im_start|>assistant\nyes<eos>"),
    "an answer of one letter": ("a", "t", "a t a t"),
}


@pytest.mark.parametrize("what", HARD)
@pytest.mark.parametrize("name", ENDS)
def test_answers_are_found_where_they_stand(name, what):
    first, last, question = HARD[what]
    learned = seen_and_learned(tokenizer_of(name), {"messages": turns(question, first, question, last)})[1]
    assert learned == expected(name, first, last)


@pytest.mark.parametrize("name", ["INST", "MODEL"])
def test_a_template_that_trims(name):
    chat = turns(" the cat? ", "  sat\n", "dog ", "\n in the rain ")
    assert seen_and_learned(tokenizer_of(name), {"messages": chat})[1] == expected(name, "sat", "in the rain")


@pytest.mark.parametrize("name", ["CHATML", "NEXT_ROLE", "THINKING", "MARKED", "TOOLS"])
def test_an_empty_answer_still_ends(name):
    chat = turns("the cat?", "", "dog?", "rain")
    assert seen_and_learned(tokenizer_of(name), {"messages": chat})[1] == expected(name, "", "rain")


@pytest.mark.parametrize("name", ["CHATML", "NEXT_ROLE", "THINKING", "OPENS_THOUGHT", "MODEL", "TOOLS"])
def test_a_chat_that_begins_with_an_answer(name):
    chat = [{"role": "assistant", "content": "hello"}, *CHAT[:2]]
    assert seen_and_learned(tokenizer_of(name), {"messages": chat})[1] == expected(name, "hello", "sat on a mat")


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("name", ["CHATML", "NEXT_ROLE", "MODEL", "TOOLS"])
def test_a_vocabulary_with_spaces_before_words(name, scheme):
    tokenizer = metaspace(scheme, getattr(templates, name))
    chat = turns("the cat?", "sat on a mat", "dog?", "in the rain")
    tokens = encode_fields(tokenizer, {"messages": chat})
    learned = tokenizer.convert_ids_to_tokens(tokens.ids[tokens.learned].tolist())
    assert "".join(learned).replace("▁", " ").replace(" ", "") == expected(name, "satonamat", "intherain")
    rendered = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert tokens.ids[: len(rendered)].tolist() == rendered


def test_a_token_across_the_border_is_learned_if_it_holds_some_of_the_answer():
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = {"<unk>": 0, "<eos>": 1, "a": 2, ":": 3, " ": 4, "b": 5, ": ": 6, "ab": 7}
    # a vocabulary that does not split at words: `: ` and `ab` are tokens, of which the prompt has the first half
    bpe = Tokenizer(models.BPE(words, [(":", " "), ("a", "b")], unk_token="<unk>"))
    bpe.normalizer, bpe.decoder = normalizers.NFC(), decoders.Fuse()
    chat = turns("b", "b")
    for template, ids, learned in (
        ("{% for m in messages %}a: {{ m.content }}{% endfor %}", [2, 6, 5, 2, 6, 5, 1], [0, 0, 0, 0, 0, 1, 1]),
        ("{% for m in messages %}a{{ m.content }}{% endfor %}", [7, 7, 1], [0, 1, 1]),
    ):
        tokenizer = templates.wrapped(bpe, template, unk_token="<unk>")
        tokens = encode_fields(tokenizer, {"messages": chat})
        assert (tokens.ids.tolist(), tokens.learned.tolist()) == (ids, [bool(mark) for mark in learned])
        prompted = templates.wrapped(bpe, template + "{% if add_generation_prompt %}a:{% endif %}", unk_token="<unk>")
        assert encode_fields(prompted, {"messages": chat}).learned.tolist() == tokens.learned.tolist()


# ---- thinking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False], ids=["in the content", "beside it"])
@pytest.mark.parametrize("name", ["THINKING", "OPENS_THOUGHT"])
def test_a_thought_is_learned_where_the_template_writes_it(name, inline):
    chat = turns("the cat?", "sat", "dog?", "rain")
    for message, thought in ((chat[1], "mat"), (chat[3], "yard")):
        if inline:
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
        else:
            message["reasoning_content"] = thought
    opens = "" if name == "OPENS_THOUGHT" else "<think>\n"
    seen, learned = seen_and_learned(tokenizer_of(name), {"messages": chat})
    assert learned == f"sat{END}{opens}yard\n</think>\n\nrain{END}"
    assert "mat" not in seen


def test_a_thought_that_is_never_written_is_refused():
    chat = [CHAT[0], CHAT[1] | {"reasoning_content": "where?"}]
    with pytest.raises(DataError, match="row 1: message 2: the chat template does not write `reasoning_content`"):
        encode_fields(tokenizer_of("CHATML"), {"messages": chat})


# ---- what is to be learned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["weight", "loss_mask", "train", "loss", "trainable"])
@pytest.mark.parametrize("name", ENDS)
def test_an_answer_may_be_left_out(name, mark):
    end, last_end, before, _ = ENDS[name]
    chat = [CHAT[0], CHAT[1] | {mark: 0}, CHAT[2], CHAT[3] | {mark: 1}]
    seen, learned = seen_and_learned(tokenizer_of(name), {"messages": chat})
    assert "sat on a mat" in seen and mark not in seen
    assert learned == before + "in the rain" + last_end
    chat = [CHAT[0], CHAT[1], CHAT[2], CHAT[3] | {mark: False}]
    learned = seen_and_learned(tokenizer_of(name), {"messages": chat})[1]
    assert learned == (before if name in WROTE_BEFORE_ALL else "") + "sat on a mat" + end


def test_a_message_may_be_left_out_where_all_is_learned():
    chat = [CHAT[0] | {"weight": 0}, CHAT[1], CHAT[2], CHAT[3] | {"weight": 0}]
    seen, learned = seen_and_learned(tokenizer_of("TOOLS"), {"messages": chat}, loss_on="all")
    assert learned == seen.replace("the cat?<eos>", "").replace("in the rain<eos>", "")


def test_a_row_of_which_nothing_is_to_be_learned_is_left_out():
    chat = [CHAT[0], CHAT[1] | {"weight": 0}]
    tokens = encode_fields(tokenizer_of("CHATML"), {"messages": chat}, {"messages": CHAT})
    assert (len(tokens), tokens.skipped) == (1, 1)


def test_a_file_of_which_nothing_is_to_be_learned(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"no row has anything to learn \(all are empty or of weight 0\)"):
        prepare_data(recipe(tmp_path, tmp_path / "a.jsonl"), tokenizer_of("CHATML"))


def test_a_question_is_learned_only_if_all_is():
    chat = [CHAT[0] | {"weight": 1}, CHAT[1]]
    with pytest.raises(DataError, match="row 1: message 1 is to be learned, says its weight, but its role is 'user'"):
        encode_fields(tokenizer_of("CHATML"), {"messages": chat})
    assert len(encode_fields(tokenizer_of("CHATML"), {"messages": chat}, loss_on="all")) == 1


def test_marked_answers_are_learned_as_they_are_marked():
    """A template's own marks count, also where they leave out what ends an answer."""
    template = templates.MARKED.replace("{{ m.content }}<eos>{% endgen", "{{ m.content }}{% endgen")
    template = template.replace("{% endgeneration %}", "{% endgeneration %}<eos>")
    tokenizer = byte_level(template)
    tokens = encode_fields(tokenizer, {"messages": CHAT})
    marks = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert tokens.learned.tolist() == [bool(mark) for mark in marks]
    assert tokenizer.decode(tokens.ids[tokens.learned].tolist()) == "sat on a matin the rain"


def test_marks_inside_of_a_macro_are_not_trusted():
    """transformers counts their places from the start of the macro."""
    template = (
        "{% macro say(m) %}{% generation %}{{ m.content }}<eos>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ say(m) }}{% else %}"
        "{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    learned = seen_and_learned(byte_level(template), {"messages": CHAT})[1]
    assert learned == "sat on a mat<eos>in the rain<eos>"


# ---- the forms of a message ------------------------------------------------------------------------------------


def in_parts(chat, kind="text"):
    return [m | {"content": [{"type": kind, "text": m["content"][:2]}, {"type": kind, "text": m["content"][2:]}]}
            for m in chat]  # fmt: skip


@pytest.mark.parametrize("name", [*ENDS, "PARTS"])
def test_a_content_in_parts_is_the_same_as_text(name):
    tokenizer = tokenizer_of(name)
    plain = encode_fields(tokenizer, {"messages": CHAT})
    for chat in (in_parts(CHAT), in_parts(CHAT, "output_text"), [*CHAT[:3], *in_parts(CHAT[3:])],
                 [m | {"content": {"type": "text", "text": m["content"]}} for m in CHAT]):  # fmt: skip
        tokens = encode_fields(tokenizer, {"messages": chat})
        assert (tokens.ids.tolist(), tokens.learned.tolist()) == (plain.ids.tolist(), plain.learned.tolist())
    assert "sat on a mat" in tokenizer.decode(plain.ids.tolist())


def test_questions_in_parts_and_replies_as_text():
    chat = [*CHAT[:2], {"role": "tool", "content": "done"}, CHAT[3]]
    seen = "<|user|>the cat?<eos><|assistant|>sat on a mat<eos><|tool|>done<eos><|assistant|>in the rain<eos>"
    assert seen_and_learned(tokenizer_of("PARTS_BUT_TOOLS"), {"messages": chat})[0] == seen


CALLS = {
    "dumped whole": ("TOOLS", 'CALL [{"type": "function", "function": {"name": "lamp", "arguments": ARGUMENTS}}]<eos>'),
    "dumped": ("THINKING", THOUGHT + '<tool_call>\n{"name": "lamp", "arguments": ARGUMENTS}\n</tool_call>' + END),
    "printed": (
        templates.NEXT_ROLE.replace(
            "{{ m.content }}",
            "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments }})<eos>"
            "{% endfor %}",
        ),
        "lamp(ARGUMENTS)<eos>",
    ),
}


@pytest.mark.parametrize("arguments", [{"on": True, "room": "é'"}, {}, {"in": {"a": [1, None]}}], ids=str)
@pytest.mark.parametrize("what", CALLS)
def test_arguments_of_a_call_are_json_once(what, arguments):
    """Given as an object or as JSON text, to templates that dump them as JSON, or print them."""
    name, wanted = CALLS[what]
    tokenizer = byte_level(getattr(templates, name, name))
    dumped = json.dumps(arguments, ensure_ascii=False)
    for given in (arguments, dumped):
        call = {"type": "function", "function": {"name": "lamp", "arguments": given}}
        chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
        chat += [{"role": "tool", "content": "done"}, {"role": "assistant", "content": "it is"}]
        learned = seen_and_learned(tokenizer, {"messages": chat})[1]
        assert learned.startswith(wanted.replace("ARGUMENTS", dumped)) and "it is" in learned
        old = {"role": "assistant", "content": None, "function_call": {"name": "lamp", "arguments": given}}
        assert dumped in seen_and_learned(tokenizer, {"messages": [CHAT[0], old]})[1]


def test_a_call_without_content_for_a_template_that_wants_one():
    template = templates.TOOLS.replace("CALL", "{{ m.content.strip() }}CALL")
    call = {"type": "function", "function": {"name": "lamp", "arguments": "{}"}}
    chat = [CHAT[0], {"role": "assistant", "tool_calls": [call]}]
    learned = seen_and_learned(byte_level(template), {"messages": chat})[1]
    assert learned == 'CALL [{"type": "function", "function": {"name": "lamp", "arguments": {}}}]<eos>'


def test_a_reply_that_needs_its_call():
    """Without the call the template would refuse the reply; the answer is found all the same, with its end."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('no call') }}{% endif %}{% endfor %}" + templates.THINKING
    )
    call = {"type": "function", "function": {"name": "lamp", "arguments": {"on": 1}}}
    chat = [CHAT[0], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "done"}, CHAT[3]]
    learned = seen_and_learned(byte_level(template), {"messages": chat})[1]
    assert learned == (
        f'{THOUGHT}<tool_call>\n{{"name": "lamp", "arguments": {{"on": 1}}}}\n</tool_call>{END}'
        f"{THOUGHT}in the rain{END}"
    )


# ---- beside the messages ---------------------------------------------------------------------------------------


BESIDE = {
    "tools": ({"tools": [LAMP]}, 'TOOLS [{"type": "function", "function": {"name": "lamp"'),
    "tools as JSON": ({"tools": json.dumps([LAMP])}, 'TOOLS [{"type": "function", "function": {"name": "lamp"'),
    "each tool as JSON": ({"tools": [json.dumps(LAMP)]}, 'TOOLS [{"type": "function", "function": {"name": "lamp"'),
    "functions": ({"functions": [LAMP["function"]]}, 'TOOLS [{"type": "function", "function": {"name": "lamp"'),
    "documents": ({"documents": [{"title": "one", "text": "rain"}]}, "[one] rain"),
    "system": ({"system": "be kind"}, "<|system|>be kind<eos>"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_stands_beside_the_messages_is_written(what):
    columns, wanted = BESIDE[what]
    tokenizer = tokenizer_of("TOOLS")
    tokens = encode_fields(tokenizer, {"messages": CHAT} | columns)
    assert wanted in tokenizer.decode(tokens.ids.tolist())
    assert tokenizer.decode(tokens.ids[tokens.learned].tolist()) == "sat on a mat<eos>in the rain<eos>"
    assert not tokens.unread
    if what == "tools":
        assert tokens.ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=True, **columns)["input_ids"]


@pytest.mark.parametrize("what", [what for what in BESIDE if what != "system"])
def test_what_the_template_does_not_write_is_refused_by_name(what):
    columns, _ = BESIDE[what]
    with pytest.raises(DataError, match=f"row 1: the chat template does not write `{next(iter(columns))}`"):
        encode_fields(tokenizer_of("CHATML"), {"messages": CHAT} | columns)


def test_a_system_column_that_is_not_written_is_refused():
    template = templates.NEXT_ROLE.replace(
        "<|{{ m.role", "{% if m.role == 'system' %}{% continue %}{% endif %}<|{{ m.role"
    )
    with pytest.raises(DataError, match="row 1: the chat template does not write `system`"):
        encode_fields(byte_level(template), {"messages": CHAT, "system": "be kind"})
    with pytest.raises(DataError, match=r"row 1: the chat template refuses the messages \(no system role\)"):
        encode_fields(tokenizer_of("MODEL"), {"messages": CHAT, "system": "be kind"})


def test_a_column_that_the_template_names_is_given_to_it():
    template = "{% if mood is defined %}<|system|>{{ mood }}<eos>{% endif %}" + templates.TOOLS
    for row in ({"mood": "kind"}, {"chat_template_kwargs": {"mood": "kind"}}):
        tokenizer = byte_level(template)
        tokens = encode_fields(tokenizer, {"messages": CHAT} | row)
        assert "<|system|>kind<eos>" in tokenizer.decode(tokens.ids.tolist()) and not tokens.unread
    named_only = "{% set mine = mood %}" + templates.TOOLS
    assert encode_fields(byte_level(named_only), {"messages": CHAT, "mood": "kind"}).unread == {"mood": "row 1"}


def test_columns_that_nothing_reads_are_named_once():
    chat = [CHAT[0] | {"name": "ann", "id": 1}, CHAT[1]]
    rows = [
        {"messages": CHAT, "label": None, "note": ""},
        {"messages": chat, "label": 1},
        {"messages": chat, "label": 2},
    ]
    assert encode_fields(tokenizer_of("CHATML"), *rows).unread == {
        "label": "row 2",
        "id of messages": "row 2",
        "name of messages": "row 2",
    }
    named = templates.CHATML.replace("{{ m.content }}", "{% if m.name %}{{ m.name }}: {% endif %}{{ m.content }}")
    assert encode_fields(byte_level(named), rows[1]).unread == {
        "label": "row 2".replace("2", "1"),
        "id of messages": "row 1",
    }
    assert encode_fields(byte_level(), {"text": "the cat", "label": 1}).unread == {"label": "row 1"}
    assert encode_fields(byte_level(), {"prompt": "a", "completion": "b", "label": 1}).unread == {"label": "row 1"}


def test_a_run_names_unread_columns_once(tiny, texts, tmp_path, no_pictures):
    rows = [json.loads(line) | {"label": 1} for line in texts.read_text().splitlines()]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = io.StringIO()
    chosen = recipe(tiny, data, steps=1, text__held_out_data=(str(data),), evaluation__sample_tokens=0)
    train(chosen, tmp_path / "out", None, Display(Console(file=said)))
    assert said.getvalue().count("`label`") == 1
    assert f"nothing reads these columns of the data: `label` ({data} line 1)" in said.getvalue()


def test_a_content_that_the_template_leaves_out_is_named():
    chat = [{"role": "assistant", "content": "wait", "tool_calls": [LAMP]}, *CHAT]
    assert encode_fields(tokenizer_of("TOOLS"), {"messages": chat}).unread == {"content of messages, in part": "row 1"}


# ---- prompts and completions of messages -----------------------------------------------------------------------


def test_of_a_prompt_of_messages_nothing_is_learned():
    row = {"prompt": CHAT[:3], "completion": CHAT[3:], "system": "be kind"}
    tokenizer = tokenizer_of("TOOLS")
    seen, learned = seen_and_learned(tokenizer, row)
    chat = [{"role": "system", "content": "be kind"}, *CHAT]
    assert seen == tokenizer.apply_chat_template(chat, tokenize=False)
    assert learned == "in the rain<eos>"
    assert seen_and_learned(tokenizer, row, loss_on="all")[1] == seen


def test_a_sample_prompt_that_is_no_text():
    with pytest.raises(DataError, match=r"evaluation\.sample_prompt holds half of a surrogate pair, \\udcff"):
        encode_prompt("a\udcff", tokenizer_of("CHATML"), chat=False)


def test_the_compiled_template_is_what_transformers_renders():
    """A private name of transformers gives it; its clock is ours only while we render."""
    from gradfold.train.chat_template import ChatTemplate, _compiled

    source = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = byte_level(source)
    then = ChatTemplate(tokenizer, datetime(1999, 1, 1))
    assert then.writes_date and then.render(CHAT[:1]) == "1999the cat?"
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False).startswith("2")
    assert _compiled(source) is _compiled(source)
    with pytest.raises(Exception, match="empty"):
        then.render([])
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False).startswith("2")
