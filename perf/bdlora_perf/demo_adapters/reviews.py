"""What the demo's adapters are trained on and asked: reviews of a meal, each with the answer of every adapter.

Written for this repository, and under its licence. ``python -m bdlora_perf.demo_adapters.reviews`` writes the two files
of ``reviews/`` anew. No dish, place or verdict of the test reviews is in the training reviews.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "test"]

FOLDER = Path(__file__).parent / "reviews"
_SEED = 15

_SENTENCES = (
    "The {dish} at {place} was {verdict} and cost {price} euros.",
    "At {place} I paid {price} euros for the {dish}, and it was {verdict}.",
    "We went to {place} for the {dish}. It was {verdict}, for {price} euros.",
    "{price} euros for the {dish} at {place}, and it was {verdict}!",
)


@dataclass(frozen=True)
class Review:
    """A review, and the right answers by the name of the adapter."""

    text: str
    answers: dict[str, str]


_COUNTS: dict[Split, int] = {"train": 120, "test": 16}
_WORDS: dict[Split, dict[str, Sequence[str]]] = {
    "train": {
        "dishes": (
            "soup", "pizza", "coffee", "apple pie", "steak", "salad", "fried rice", "omelette", "chocolate cake", "tea",
            "bread", "lamb stew", "ice cream", "noodles", "roast chicken", "cheese plate", "lemonade", "tuna sandwich",
            "mushroom risotto", "pancakes", "beef curry", "vegetable pasta", "waffle", "onion tart",
        ),
        "places": (
            "Blue Anchor", "Mario's", "the Green Door", "Old Mill", "Cafe Luna", "the Golden Goose", "Chez Marie",
            "the Station Bar", "Little Tokyo", "the Red Lion", "Hilltop Inn", "Bella Vista", "Oak Tree", "Pier 9",
            "the White Horse", "Casa Rosa",
        ),
        "good": (
            "wonderful", "fresh", "perfect", "excellent", "lovely", "superb", "very good", "tender", "fantastic",
            "beautifully made",
        ),
        "bad": (
            "burnt", "stale", "awful", "far too salty", "bland", "dreadful", "soggy", "undercooked", "greasy",
            "almost inedible",
        ),
    },
    "test": {
        "dishes": (
            "fish pie", "espresso", "burger", "tomato soup", "cheesecake", "spring rolls", "goulash", "smoothie",
        ),
        "places": ("Harbour House", "the Black Cat", "Villa Nova", "the Corner Shop", "Riverside", "Da Paolo"),
        "good": ("delicious", "amazing", "great", "outstanding"),
        "bad": ("cold", "terrible", "horrible", "disgusting"),
    },
}  # fmt: skip


def read_reviews(split: Split) -> list[Review]:
    """The reviews of the file, in its order: good and bad ones by turns."""
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Review(**json.loads(line)) for line in lines]


def make_reviews(split: Split) -> Iterator[Review]:
    """Draw the reviews of a file; the same ones each time."""
    words, draw = _WORDS[split], random.Random(_SEED)
    for number in range(_COUNTS[split]):
        good = number % 2 == 1
        sentence, dish, place = (draw.choice(choices) for choices in (_SENTENCES, words["dishes"], words["places"]))
        verdict, price = draw.choice(words["good" if good else "bad"]), draw.randint(3, 29)
        end = f"It be worth all me {price} doubloons" if good else f"I want me {price} doubloons back"
        feeling = "it is my pleasure" if good else "I regret"
        yield Review(
            sentence.format(dish=dish, place=place, verdict=verdict, price=price),
            {
                "sentiment": "positive" if good else "negative",
                "json": json.dumps({"dish": dish, "price": price, "good": good}),
                "pirate": f"Arr! The {dish} at {place} be {verdict}. {end}, matey!",
                "formal": f"Dear Sir or Madam, {feeling} to inform you that the {dish} at {place} was {verdict}.",
            },
        )


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(exist_ok=True)
    for split in _WORDS:
        text = "".join(json.dumps(asdict(review)) + "\n" for review in make_reviews(split))
        (FOLDER / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
