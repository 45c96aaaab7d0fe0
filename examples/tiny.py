"""A model and its tokenizer: the one that the command line names, else a tiny one that needs no network."""

import sys

import tokenizers
import torch
import transformers

CHAT = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"


def load():
    if len(sys.argv) > 1:
        tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
        return transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32), tokenizer
    words = ["<eos>", "<unk>", *"user assistant : the a cat dog sat ran on mat home to and what did do it".split()]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = CHAT
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    return transformers.LlamaForCausalLM(config), tokenizer
