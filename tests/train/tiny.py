"""A tiny Llama with a tokenizer of its own, and recipes that train it in a blink."""

from pathlib import Path

import torch

from gradfold.train.recipe import Recipe
from gradfold.train.recipe_file import unflatten
from tests.llama import small_llama

WORDS = "the cat sat on a mat and saw the dog run to its bowl while rain fell in the long green yard".split()

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_bpe(tokens, special, add_prefix_space=False):
    """A byte-level BPE that has learned from 50 sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([sentence(seed) for seed in range(50)], trainer)
    return bpe


def build_tokenizer():
    """A byte-level BPE of 300 tokens, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    bpe = byte_level_bpe(300, ["<eos>", "<|user|>", "<|assistant|>", "<|system|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(**changes):
    """A Llama of 30 thousand parameters, tied, with dropout so that random numbers matter."""
    from transformers import LlamaForCausalLM

    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(7)
    return LlamaForCausalLM(small_llama(**(settings | changes)))


def save_tiny(folder: Path, **changes) -> Path:
    build_model(**changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def sentence(seed: int, words: int = 12) -> str:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (words,), generator=generator)
    return " ".join(WORDS[i] for i in picks)


def recipe(model: Path, data: Path, **fields) -> Recipe:
    """A recipe of a few tiny steps; `fields` by name, dots as two underscores."""
    small = {
        "model": str(model),
        "data": (str(data),),
        "steps": 6,
        "batch_size": 3,
        "sequence_length": 32,
        "optimizer.lr": 1e-2,
        "text.held_out": 0.2,
        "evaluation.sequences": 4,
        "evaluation.sample_tokens": 4,
    }
    return unflatten(small | {name.replace("__", "."): value for name, value in fields.items()}, Recipe())


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under a folder and what it holds."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
