"""The engine with the Triton kernels, interpreted: the path that a GPU takes, without its graphs."""

import atexit

import pytest

from bdlora_perf.reference import PeftReference
from tests.serving.zoo import Zoo

# The interpreter takes seconds for what a GPU does in microseconds.
NEW_TOKENS = 2
PROMPT = [11, 23, 5]


def test_tokens_equal_peft(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of every kind and the base model in one batch; one adapter comes when the server runs."""
    from bdlora_sglang import Engine

    model = zoo.model("llama", num_hidden_layers=1)
    adapters = zoo.adapters(model, but={"bd2-v-down-layer1", "bd4-patterns-rslora"})
    given, late = ("plain-r5-rslora", "bd3-r12", "bd8-r16"), "plain-r16"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    engine = Engine(
        model_path=str(model),
        dtype="float32",
        lora_paths=[f"{name}={adapters[name]}" for name in given],
        lora_target_modules=["all"],
        max_lora_rank=16,
        max_loras_per_batch=3,  # fewer slots than adapters: slots are written again
        skip_tokenizer_init=True,
        log_level="error",
    )
    try:
        reference = PeftReference(model)
        assert engine.load_lora_adapter(late, str(adapters[late])).success
        names = [None, *given, late]
        answers = engine.generate(
            input_ids=[PROMPT] * len(names),
            lora_path=names,
            sampling_params={"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            return_logprob=True,
        )
        for name, answer in zip(names, answers, strict=True):
            expected = reference.generate(PROMPT, adapters.get(name or ""), NEW_TOKENS)
            assert answer["output_ids"] == expected.tokens, name
            logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
            assert max(abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True)) < 1e-4, name
    finally:
        engine.shutdown()
        atexit.unregister(engine.shutdown)
