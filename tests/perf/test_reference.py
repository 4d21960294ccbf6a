"""PEFT as a reference: one forward says the same of an answer as decoding it token by token."""

from pathlib import Path

from bdlora_perf.synthetic import make_adapter, make_model
from bdlora_perf.synthetic.reference import PeftReference

PROMPT = [5, 40, 300, 7]


def test_what_greedy_decoding_gives_is_greedy_and_nothing_else(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, nblocks=2)
    reference = PeftReference(model)
    for folder, other in ((None, adapter), (adapter, None)):
        tokens = reference.generate(PROMPT, folder, 12).tokens
        assert reference.is_greedy(PROMPT, folder, tokens)
        assert not reference.is_greedy(PROMPT, other, tokens)
        for changed in range(len(tokens)):
            assert not reference.is_greedy(PROMPT, folder, [*tokens[:changed], tokens[changed] ^ 1])
