"""Four small adapters of SmolLM2 that visibly do their own task, how they were trained, and on what."""

from bdlora_perf.demo_adapters.reviews import Review, read_reviews
from bdlora_perf.demo_adapters.tasks import ADAPTERS, ADAPTERS_FOLDER, DemoAdapter, chat_answer, chat_prompt

__all__ = ["ADAPTERS", "ADAPTERS_FOLDER", "DemoAdapter", "Review", "chat_answer", "chat_prompt", "read_reviews"]
