"""The bound on what a search may cost, against counts by hand."""

import pytest

from bdlora_sglang.serving.gate.errors import RequestError
from bdlora_sglang.serving.gate.stop_regex import MAX_STEPS, check_patterns, check_search, search_steps

LENGTH = 2000
LINEAR, QUADRATIC, CUBIC = (LENGTH**power for power in (1, 2, 3))


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("", LINEAR),
        ("\n\n", LINEAR),
        ("stop|halt|end", LINEAR),
        ("[.!?] ", LINEAR),
        (r"\d+\.\d+", QUADRATIC),
        (r"<a>(.*)", QUADRATIC),
        (r"(<a>.*){2}", CUBIC),
        (r"[^<]+<", QUADRATIC),
        (r"[^0-9]+<", QUADRATIC),
        (r"<answer>.*</answer>", QUADRATIC),
        (r"(?s)<answer>.*?</answer>", QUADRATIC),
        (r"([a-z]|[A-Z])+!", QUADRATIC),
        (r"(\w+\s)+!", QUADRATIC),
        (r"\s{1,20}x", 20 * LINEAR),
        ("a{10}", 10 * LINEAR),
        ("(?:^){100000000}", 1e8 * LINEAR),
        ("a*a*a*b", LENGTH**4),
        # Sets that meet in letters alone that are not Latin's, or only as letters of another case.
        ("[一-鿿]+中", QUADRATIC),
        (r"\w+中", QUADRATIC),
        (r"[^\d]+中", QUADRATIC),
        ("(?i)a+A", QUADRATIC),
        ("(?i:a+A)", QUADRATIC),
        ("(?:a+(?i:A))", QUADRATIC),
    ],
)
def test_steps(pattern: str, steps: float) -> None:
    assert steps <= search_steps(pattern, LENGTH) * 1.001
    # An overlap counts the ways and not how long each is: both are bounds of the same power.
    assert search_steps(pattern, LENGTH) <= 8 * steps


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(a|aa)+$", "(a|a?)+$", "(a|b*)*c", r"(a)\1", "(|a){1000}", "x(?=(a+)+b)", "(?:(?:a?){50})b"),
        *("a?" * 60 + "a" * 60, "(ab|a)(ab|a|b)" * 17, "(.*)*x", "(a*?)*x", "((ab)*)*x", "(a(?=(a|aa)+$))"),
    ],
    ids=lambda pattern: pattern[:20],
)
def test_patterns_of_exponential_time_are_refused_in_any_text(pattern: str) -> None:
    assert search_steps(pattern, 64) > MAX_STEPS
    with pytest.raises(RequestError, match="stop_regex"):
        check_search("stop_regex", [pattern], tokens=64, token_chars=1)


def test_patterns_share_the_bound_and_its_message_says_what_to_do() -> None:
    check_search("stop_regex", [r"\d+\."], tokens=4096, token_chars=7)
    with pytest.raises(RequestError, match=r"\{1,20\}.*max_new_tokens"):
        check_search("stop_regex", [r"\d+\."] * 2, tokens=4096, token_chars=7)
    check_search("stop_regex", [r"\d{1,20}\."] * 32, tokens=22, token_chars=128)


def test_no_text_costs_nothing() -> None:
    assert search_steps("(a+)+$", 0) == search_steps(r"(a)\1", 0) == 0


@pytest.mark.parametrize("pattern", ["(", "(?P<a", "a**", "[", "(" * 120])
def test_what_does_not_compile(pattern: str) -> None:
    with pytest.raises(RequestError, match="regular expression of Python"):
        check_patterns("stop_regex", [pattern])


def test_limits_of_sglang() -> None:
    with pytest.raises(RequestError, match="at most 256 bytes"):
        check_patterns("stop_regex", ["é" * 129])
    with pytest.raises(RequestError, match="at most 32"):
        check_patterns("stop_regex", ["a"] * 33)
    check_patterns("stop_regex", ["é" * 128] * 32)
