"""A review as a chat with one question, in token ids: what the adapters are trained with, and asked."""

from typing import Any


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """A chat in which the user has said ``text`` and the model is to answer."""
    chat = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def chat_answer(tokenizer: Any, text: str) -> list[int]:
    """The answer ``text`` with its end."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
