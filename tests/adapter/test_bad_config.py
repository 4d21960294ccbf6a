"""Fields of ``adapter_config.json`` that are wrong, or that ask for what we cannot serve."""

import pytest

from bdlora_sglang.adapter import Adapter
from bdlora_sglang.errors import AdapterError
from tests.adapter.drafts import Draft, assert_refused

HUGE = 10**400  # JSON has no limit, float has one

FIELDS = [
    ("peft_type", None, "'LORA'"),
    ("peft_type", "IA3", "'LORA'"),
    ("r", None, "an integer of at least 1"),
    ("r", 0, "an integer of at least 1"),
    ("r", "8", "an integer of at least 1"),
    ("r", 8.0, "an integer of at least 1"),
    ("r", True, "an integer of at least 1"),
    ("lora_alpha", None, "a finite number"),
    ("lora_alpha", "16", "a finite number"),
    ("lora_alpha", float("nan"), "a finite number"),
    ("lora_alpha", float("inf"), "a finite number"),
    ("lora_alpha", HUGE, "a finite number"),
    ("use_rslora", "yes", "true or false"),
    ("rank_pattern", ["q_proj"], "an object"),
    ("rank_pattern.q_proj", 0, "an integer of at least 1"),
    ("rank_pattern.(", 8, "regular expression"),
    ("alpha_pattern.q_proj", "16", "a finite number"),
    ("target_modules", 7, "a list of strings"),
    ("target_modules", ["q_proj", 7], "a list of strings"),
    ("target_modules", "(q_proj", "regular expression"),
    ("layers_to_transform", "0", "an integer or a list of integers"),
    ("layers_to_transform", [0.5], "an integer or a list of integers"),
    ("layers_pattern", {"layers": 1}, "a list of strings"),
    ("layers_pattern", "(layers", "regular expression"),
    ("use_bdlora", True, "an object with 'nblocks'"),
    ("use_bdlora.nblocks", 0, "an integer of at least 1"),
    ("use_bdlora.nblocks", "4", "an integer of at least 1"),
    ("use_bdlora.target_modules_bd_a", 7, "a list of strings"),
    ("use_bdlora.match_strict", 1, "true or false"),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), [pytest.param(*case, id=f"{case[0]}={str(case[1])[:12]}") for case in FIELDS]
)
def test_fields(name: str, value: object, expected: str) -> None:
    draft = Draft()
    outer, _, inner = name.partition(".")
    if inner:
        draft.config.setdefault(outer, {})[inner] = value
    else:
        draft.config[outer] = value
    with pytest.raises(AdapterError) as caught:
        Adapter.from_tensors(draft.tensors, draft.config, "spoilt")
    subject = outer if inner == "(" else name
    assert_refused(caught.value, "spoilt", f"field '{subject}", "" if inner == "(" else repr(value)[:20], expected)


def test_a_scaling_that_float32_cannot_hold() -> None:
    draft = Draft()
    draft.config["lora_alpha"] = 1e300
    with pytest.raises(AdapterError) as caught:
        Adapter.from_tensors(draft.tensors, draft.config, "spoilt")
    assert_refused(caught.value, "spoilt", "lora_alpha / r of module", "e+2", "float32")


FEATURES = {
    "use_dora": (True, "DoRA"),
    "use_qalora": (True, "QALoRA"),
    "lora_bias": (True, "bias in lora_B"),
    "bias": ("all", "trained biases"),
    "trainable_token_indices": ([3, 4], "trainable tokens"),
    "alora_invocation_tokens": ([5], "activated LoRA"),
    "layer_replication": ([[0, 2], [1, 3]], "layer replication"),
    "megatron_config": ({"tensor_model_parallel_size": 2}, "Megatron"),
    "arrow_config": ({"top_k": 3}, "Arrow"),
    "kasa_config": ({"beta": 0.1}, "KaSA"),
    "monteclora_config": ({"num_samples": 4}, "MonteCLoRA"),
    "use_something_new": (True, "unknown LoRA variant"),
    "init_lora_weights": ("pissa_niter_16", "changes the base model"),
}


@pytest.mark.parametrize(("name", "value", "feature"), [pytest.param(n, *v, id=n) for n, v in FEATURES.items()])
def test_unsupported_features_are_refused_by_name(name: str, value: object, feature: str) -> None:
    draft = Draft()
    draft.config[name] = value
    with pytest.raises(AdapterError) as caught:
        Adapter.from_tensors(draft.tensors, draft.config, "spoilt")
    assert_refused(caught.value, "spoilt", f"field '{name}'", str(value), "")
    assert feature in caught.value.subject


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq"])
def test_initialisations_that_change_the_base_model_are_refused(init: str) -> None:
    draft = Draft()
    draft.config["init_lora_weights"] = init
    with pytest.raises(AdapterError, match="init_lora_weights"):
        Adapter.from_tensors(draft.tensors, draft.config, "spoilt")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "lora_ga", "mica"])
def test_other_initialisations_do_not_matter(init: object) -> None:
    draft = Draft()
    draft.config["init_lora_weights"] = init
    assert Adapter.from_tensors(draft.tensors, draft.config, "good").modules


def test_features_that_are_off_do_not_matter() -> None:
    draft = Draft()
    draft.config |= dict.fromkeys(FEATURES)
    draft.config |= {"use_dora": False, "modules_to_save": [], "bias": "none", "lora_bias": False}
    assert Adapter.from_tensors(draft.tensors, draft.config, "good").modules
