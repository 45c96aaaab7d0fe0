"""Small Llamas: one configuration for all tests, changed where a test's subject asks for it."""


def small_llama(vocab_size=512, hidden_size=64, num_hidden_layers=1, **changes):
    """A LlamaConfig of four heads, feed-forward layers twice as wide, and no special tokens of its own."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    return LlamaConfig(**sizes, **{"intermediate_size": 2 * hidden_size, "num_attention_heads": 4, **changes})
