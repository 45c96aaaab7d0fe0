"""Which tokens are learned."""

import json

import numpy as np
import pytest

from gradfold.train.errors import DataError, ModelError
from gradfold.train.readers import DataRow
from gradfold.train.tokens import encode_rows
from tests.train.templates import byte_level, metaspace, word_piece

CHAT = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat on a mat"},
    {"role": "user", "content": "and the dog?"},
    {"role": "assistant", "content": "in the rain"},
)


def encode(tokenizer, *rows, loss_on="completions", too_long="error", limit=128):
    return encode_rows(rows, tokenizer, loss_on=loss_on, too_long=too_long, limit=limit)


def texts(tokenizer, tokens, row=0):
    """(all of a row, its learned part), decoded."""
    span = slice(tokens.starts[row], tokens.starts[row + 1])
    ids, learned = tokens.ids[span], tokens.learned[span]
    return tokenizer.decode(ids.tolist()), tokenizer.decode(ids[learned].tolist())


def test_a_text_is_learned_whole_and_ends(tokenizer):
    tokens = encode(tokenizer, DataRow("r", "text", text="the cat sat"))
    assert texts(tokenizer, tokens) == ("the cat sat<eos>", "the cat sat<eos>")
    assert tokens.is_document.tolist() == [True]


def test_of_a_prompt_and_completion_the_completion_is_learned(tokenizer):
    row = DataRow("r", "completion", prompt="the cat", completion=" sat on a mat")
    assert texts(tokenizer, encode(tokenizer, row)) == ("the cat sat on a mat<eos>", " sat on a mat<eos>")
    assert texts(tokenizer, encode(tokenizer, row, loss_on="all"))[1] == "the cat sat on a mat<eos>"


def test_a_prompt_is_tokenized_as_it_is_at_inference(tokenizer):
    """`th` + `e` would merge into one token; the model will only ever be given `th`."""
    tokens = encode(tokenizer, DataRow("r", "completion", prompt="th", completion="e"))
    assert tokens.ids[: tokens.learned.argmax()].tolist() == tokenizer("th")["input_ids"]


SPLIT = [
    ("2+2=", "4"),
    ("Answer: ", "yes"),
    ("Answer:", " yes"),
    ("th", "e"),
    ("the cat", " sat on a mat"),
    ("x", "(y)"),
    ("the\n", "\ncat"),
    ("the", ""),
    ("", "the cat"),
]
TOKENIZERS = {
    "byte level": byte_level,
    "byte level, with a space before": lambda: byte_level(add_prefix_space=True),
    "a space before the first word": lambda: metaspace("first"),
    "a space before each word": lambda: metaspace("always"),
    "a space before, after a beginning": lambda: metaspace("first", bos_token="<bos>", add_bos_token=True),
    "pieces of words": word_piece,
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_prompt_and_its_completion_are_the_text_of_both(what):
    """No space between them that is not there, and the tokens of the one text, up to one across the border."""
    tokenizer = TOKENIZERS[what]()
    for prompt, completion in SPLIT:
        tokens = encode(tokenizer, DataRow("r", "completion", prompt=prompt, completion=completion))
        whole = tokenizer(prompt + completion)["input_ids"]
        *ids, end = tokens.ids.tolist()
        assert tokenizer.decode(ids) == tokenizer.decode(whole), (prompt, completion)
        assert end == tokenizer.eos_token_id and tokens.learned[-1]
        before = tokenizer(prompt)["input_ids"]
        assert ids[: len(before)] == before
        assert tokens.learned.tolist() == [False] * len(before) + [True] * (len(ids) + 1 - len(before))
        if whole[: len(before)] == before:
            assert ids == whole


def test_a_completion_that_cannot_be_told_from_its_prompt():
    """In whole words, `the` and `cat` without a space are another word: that is what the model sees and learns."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "the": 2, "cat": 3, "thecat": 4, "a": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokens = encode(tokenizer, DataRow("r", "completion", prompt="a the", completion="cat"))
    assert (tokens.ids.tolist(), tokens.learned.tolist()) == ([5, 4, 1], [False, True, True])


def test_of_messages_the_answers_are_learned_with_their_ends(tokenizer):
    row = DataRow("r", "messages", messages=CHAT)
    whole, learned = texts(tokenizer, encode(tokenizer, row))
    assert whole == tokenizer.apply_chat_template(list(CHAT), tokenize=False)
    assert learned == "sat on a mat<eos>in the rain<eos>"
    assert texts(tokenizer, encode(tokenizer, row, loss_on="all"))[1] == whole


def test_messages_become_the_tokens_that_the_template_gives(tokenizer):
    tokens = encode(tokenizer, DataRow("r", "messages", messages=CHAT))
    expected = tokenizer.apply_chat_template(list(CHAT), tokenize=True, return_dict=True)["input_ids"]
    assert tokens.ids.tolist() == expected


def test_a_template_that_rewrites_earlier_turns_is_refused_rather_than_masked_wrongly(tokenizer):
    old = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|assistant|>...{% else %}"
        "<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    try:
        with pytest.raises(DataError, match="r: the chat template rewrites earlier turns, so message 3"):
            encode(tokenizer, DataRow("r", "messages", messages=CHAT))
        assert len(encode(tokenizer, DataRow("r", "messages", messages=CHAT[:3])))
    finally:
        tokenizer.chat_template = old


def test_a_refusal_of_the_template_names_the_row(tokenizer):
    tokenizer.chat_template, old = "{{ raise_exception('no system role') }}", tokenizer.chat_template
    try:
        with pytest.raises(DataError, match=r"r: the chat template refuses the messages \(no system role\)"):
            encode(tokenizer, DataRow("r", "messages", messages=CHAT))
        tokenizer.chat_template = None
        with pytest.raises(ModelError, match="no chat template"):
            encode(tokenizer, DataRow("r", "messages", messages=CHAT))
    finally:
        tokenizer.chat_template = old


@pytest.mark.parametrize(("too_long", "lengths"), [("truncate", [None, 8]), ("drop", [None])])
def test_long_rows(tokenizer, too_long, lengths):
    rows = [
        DataRow("short", "completion", prompt="the", completion=" cat"),
        DataRow("long", "completion", prompt="the", completion=" cat" * 40),
    ]
    tokens = encode(tokenizer, *rows, too_long=too_long, limit=8)
    short = len(encode(tokenizer, rows[0]).ids)
    assert tokens.lengths.tolist() == [length or short for length in lengths]
    with pytest.raises(
        DataError, match=r"long: has \d+ tokens, over sequence_length = 8; raise it, or set text.too_long"
    ):
        encode(tokenizer, *rows, limit=8)


def test_a_truncated_row_with_nothing_left_to_learn_is_left_out(tokenizer):
    row = DataRow("r", "completion", prompt="the cat " * 20, completion="sat")
    tokens = encode(tokenizer, row, DataRow("s", "text", text="the dog"), too_long="truncate", limit=8)
    assert (len(tokens), tokens.skipped) == (1, 1)


def test_blank_texts_are_left_out_and_counted(tokenizer):
    tokens = encode(
        tokenizer, DataRow("a", "text", text=" \n"), DataRow("b", "text", text="the cat"), DataRow("c", "text", text="")
    )
    assert (len(tokens), tokens.skipped) == (1, 2)
    assert texts(tokenizer, tokens)[0] == "the cat<eos>"


def test_many_rows_keep_their_order(tokenizer):
    rows = [
        DataRow(str(i), "text", text=f"{i}") if i % 2 else DataRow(str(i), "completion", prompt=f"{i}", completion="x")
        for i in range(700)
    ]
    tokens = encode(tokenizer, *rows)
    assert [texts(tokenizer, tokens, i)[0] for i in (0, 1, 300, 699)] == ["0x<eos>", "1<eos>", "300x<eos>", "699<eos>"]
    assert tokens.is_document.tolist() == [bool(i % 2) for i in range(700)]
    assert np.array_equal(tokens.starts[1:] - tokens.starts[:-1], tokens.lengths)


def test_a_tokenizer_that_ends_prompts_by_itself_does_not_end_them_here(tokenizer):
    from tokenizers.processors import TemplateProcessing

    ending = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    copy = json.loads(ending.backend_tokenizer.to_str())
    ending = type(tokenizer)(tokenizer_object=ending.backend_tokenizer.from_str(json.dumps(copy)), eos_token="<eos>")
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    assert ending("the")["input_ids"][-1] == 0
    row = DataRow("r", "completion", prompt="the cat", completion=" sat")
    assert texts(ending, encode(ending, row)) == ("the cat sat<eos>", " sat<eos>")
    assert texts(ending, encode(ending, DataRow("r", "text", text="the cat")))[0] == "the cat<eos>"
