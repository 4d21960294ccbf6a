"""The demo's adapters: each answers the same review in its own way."""

from dataclasses import dataclass
from pathlib import Path

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
