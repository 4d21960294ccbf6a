"""The demo's adapters: each answers the same review in its own way, in a chat with one question."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTERS_FOLDER = Path(__file__).parent / "adapters"


@dataclass(frozen=True)
class DemoAdapter:
    """An adapter by its task's name, its whole rank and its blocks (None: plain LoRA)."""

    name: str
    rank: int
    nblocks: int | None

    @property
    def folder(self) -> Path:
        """PEFT's files, as they were trained."""
        return ADAPTERS_FOLDER / self.name


# 3 and 6 blocks divide each of the model's sizes.
ADAPTERS = (
    DemoAdapter("sentiment", rank=6, nblocks=3),
    DemoAdapter("json", rank=12, nblocks=6),
    DemoAdapter("pirate", rank=4, nblocks=None),
    DemoAdapter("formal", rank=6, nblocks=3),
)


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a chat in which the user has said ``text`` and the model is to answer."""
    chat = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def chat_answer(tokenizer: Any, text: str) -> list[int]:
    """Those of the answer ``text`` with its end."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
