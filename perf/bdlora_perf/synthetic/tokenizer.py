"""A small byte-level BPE tokenizer with a chat template, trained on the sentences below."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512

# The second has the name that transformers adds to the tokenizer of any Qwen2 model that lacks it.
_SPECIAL_TOKENS = ("<|bos|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS_ID = 0
EOS_ID = 1

_SENTENCES = (
    "Tensor parallelism splits the weights of every layer over several devices, and each device computes its own part.",
    "A column-parallel layer splits its output features; a row-parallel layer splits its input features and adds up.",
    "An adapter is a pair of thin matrices: the first one shrinks the hidden state, the second one expands it again.",
    "When one factor is block-diagonal, each device holds a small independent adapter on its own shard of the layer.",
    "No message is sent for the adapter: the sum that the base layer needs anyway carries the difference along.",
    "Once upon a time there was a little language model that had never read a book, and it was very proud of it.",
    "What is the capital of a country whose name nobody knows? Please answer in a short sentence, with a reason.",
    "The quick brown fox jumps over the lazy dog, while seventeen zebras quietly examine the broken water pump.",
    "Hello! How are you today? I am fine, thank you. Write a short story about the sea, the wind and an old ship.",
    "def main(values: list[int]) -> int:\n    return sum(value * value for value in values if value > 10)\n",
    "In 2024 there were 366 days, 12 months, 52 weeks; 3 + 4 = 7, and 6 * 8 = 48, or so the teacher told us.",
)

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of `VOCAB_SIZE` tokens that loses no text. It adds no special tokens; the chat template does."""
    bos, eos = _SPECIAL_TOKENS[BOS_ID], _SPECIAL_TOKENS[EOS_ID]
    tokenizer = train_tokenizer(_SENTENCES, VOCAB_SIZE, _SPECIAL_TOKENS, bos_token=bos, eos_token=eos, pad_token=eos)
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids([bos, eos]) == [BOS_ID, EOS_ID]
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str], **roles: str
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer, trained on ``texts``.

    Args:
        special_tokens: get the first ids.
        **roles: which of them are transformers' ``eos_token`` and others.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def make_word_tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer of so many words, none of them special: whatever a model generates has a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def unprintable_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Tokens that have no text alone: special ones, and bytes that are no whole character in UTF-8."""
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(VOCAB_SIZE)]
    return [token for token, text in enumerate(texts) if not text or "\ufffd" in text]
