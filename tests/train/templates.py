"""Chat templates that write what those of well-known models write, each in few words, and tokenizers for them."""

from gradfold.train.shapes import form_of, make_row
from gradfold.train.tokens import encode_rows
from tests.train.tiny import byte_level_bpe, sentence

SPECIAL = ["<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The next turn's role ends a turn, and nothing ends the last one (GLM).
NEXT_ROLE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# An end between turns only.
BETWEEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# No generation prompt, a beginning of its own, contents trimmed, spaces around answers (Llama 2).
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos>[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} <eos>{% endif %}{% endfor %}"
)
# Roles of its own, contents trimmed, no system role (Gemma).
MODEL = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# What was thought is written for answers after the last question only, and then always (Qwen3).
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set said = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for call in m.tool_calls %}{% set f = call.function %}\n<tool_call>\n"
    '{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}}\n</tool_call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same, but the generation prompt opens the thought (DeepSeek R1, QwQ).
OPENS_THOUGHT = THINKING.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
)
# Not one special token: turns begin with words and end with a line (Vicuna, Alpaca).
WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = (
    "{% if tools %}<|system|>TOOLS {{ tools | tojson }}<eos>{% endif %}"
    "{% if documents %}<|system|>{% for d in documents %}[{{ d.title }}] {{ d.text }}{% endfor %}<eos>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}CALL {{ m.tool_calls | tojson }}"
    "{% else %}{{ m.content }}{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Takes contents in parts only, as templates for pictures do.
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<eos>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The same for questions and answers, but what a tool says is text.
PARTS_BUT_TOOLS = PARTS.replace(
    "{% for part in m.content", "{% if m.role == 'tool' %}{{ m.content + '' }}{% endif %}{% for part in m.content"
)


def byte_level(template=None, **options):
    """A byte-level BPE whose chat template is `template`."""
    bpe = byte_level_bpe(330, SPECIAL, options.pop("add_prefix_space", False))
    return wrapped(bpe, template, **options)


def metaspace(scheme, template=None, **options):
    """A BPE that puts a space before texts, as SentencePiece does: before each text (first) or piece of it (always)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    texts = [sentence(seed) for seed in range(50)] + ["2+2=4 3+3=6 Answer: yes no x(y) [INST]/.,?\n"] * 3
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return wrapped(bpe, template, unk_token="<unk>", **options)


def word_piece():
    """A WordPiece whose pieces inside of words begin with ##."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    piece = Tokenizer(models.WordPiece(unk_token="<unk>"))
    piece.normalizer = normalizers.BertNormalizer()
    piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    piece.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    piece.train_from_iterator([sentence(seed) for seed in range(50)] + ["2+2=4 answer: yes no"] * 3, trainer)
    return wrapped(piece, None, unk_token="<unk>")


def wrapped(tokenizer, template, **options):
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>"} | options)
    wrapped.chat_template = template
    return wrapped


def turns(*contents, system=None):
    """Messages of these contents, of a user and an assistant in turn."""
    roles = ("user", "assistant")
    chat = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *chat] if system else chat


def encode_fields(tokenizer, *rows, loss_on="completions", limit=2000, **options):
    """Rows of these fields as tokens."""
    made = [make_row(fields, form_of(fields, f"row {i}"), f"row {i}") for i, fields in enumerate(rows, 1)]
    return encode_rows(made, tokenizer, loss_on=loss_on, too_long="error", limit=limit, **options)


def seen_and_learned(tokenizer, *rows, **options):
    """(what the model sees, what it learns) of these rows, as texts."""
    tokens = encode_fields(tokenizer, *rows, **options)
    return tokenizer.decode(tokens.ids.tolist()), tokenizer.decode(tokens.ids[tokens.learned].tolist())
