"""Recordings against the functions that they are of: equal bit by bit, or not taken."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from bdlora_sglang.serving.cpu.recording import Recorder, Recording, one_step

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
COUNTED = torch.zeros(8)


def inputs(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, generator=generator), torch.randint(0, 8, (4,), generator=generator)]


def record(function: Callable[..., torch.Tensor], given: Sequence[torch.Tensor]) -> tuple[Recording, int]:
    with torch.inference_mode(), Recorder(given) as recorder:
        output = function(*given)
    return recorder.recording, recorder.place_of(output)


def reason_or_recording(function: Callable[..., torch.Tensor]) -> str | tuple[Recording, int]:
    """Why two recordings are not taken as one, or the second."""
    first, _ = record(function, inputs(1))
    second, place = record(function, inputs(2))
    if second.obstacle:
        return second.obstacle
    return (second, place) if second.agrees_with(first) else "they differ"


def views_and_writes(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    q, k = torch.split(x @ WEIGHT, [3, 5], dim=1)
    q += 1
    buffer = torch.empty(2, 4, 8)
    buffer[0] = torch.cat([k, q], dim=-1)
    buffer[1].copy_(WEIGHT[:4])
    buffer.select(0, 1).index_add_(0, i % 4, x)
    return buffer.sum(0).unbind(0)[2]


def lookup(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    is_own = (i >= 2) & (i < 6)
    rows = torch.nn.functional.embedding((i - 2) * is_own, WEIGHT)
    rows += WEIGHT.data[i, None, 0]
    return rows.masked_fill_(~is_own[:, None], 0) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


@one_step
def reads_what_it_likes(x: torch.Tensor, parts: list[torch.Tensor], times: int) -> tuple[torch.Tensor, None]:
    largest = max(x.flatten().tolist())
    for part in parts:
        part += largest * times
    return x.clone() if largest > 2 else 2 * x, None


def whole_steps(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    left, right = x.clone()[:, :4], x[:, 4:] * 1
    y, _ = reads_what_it_likes(x, [left, right], times=3)
    return y + torch.cat([left, right], dim=1)


def tensors_of_numbers(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    scale, counts = torch.tensor(8**0.5), torch.tensor([1, 2, 3, 4])
    counts[0] += 1
    return x * scale * counts[:, None]


@pytest.mark.parametrize(
    "function", [views_and_writes, lookup, whole_steps, tensors_of_numbers], ids=lambda f: f.__name__
)
def test_the_same_bits(function: Callable[..., torch.Tensor]) -> None:
    found = reason_or_recording(function)
    assert not isinstance(found, str), found
    recording, place = found
    for seed in range(3, 30):
        given = inputs(seed)
        expected = function(*(x.clone() for x in given))
        with torch.inference_mode():
            assert torch.equal(recording.run(given)[place], expected)


def if_positive(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > -1e9 else -x


def a_loop_over_values(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x * sum(0 * value + 1 for value in i.tolist())


def numpy_values(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x * (0 * i.numpy().max() + 1)


def a_slice_by_value(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x[: 0 * i[0] + 2]


def chosen_rows(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x[i < 100] * 2


def where_not_zero(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x.nonzero()


def an_address(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x * (0 * x.data_ptr() + 1)


@pytest.mark.parametrize(
    ("function", "obstacle"),
    [
        (if_positive, "Tensor.__bool__"),
        (a_loop_over_values, "Tensor.tolist"),
        (numpy_values, "Tensor.numpy"),
        (a_slice_by_value, "aten.item.default"),
        (chosen_rows, "aten.index.Tensor"),
        (where_not_zero, "aten.nonzero.default"),
        (an_address, "Tensor.data_ptr"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_depends_on_values_is_not_taken(function: Callable[..., torch.Tensor], obstacle: str) -> None:
    """All of these do the same for any inputs here: two recordings alone would not tell."""
    assert reason_or_recording(function) == obstacle


def test_what_differs_is_not_taken() -> None:
    calls = iter(range(100))
    assert reason_or_recording(lambda x, i: x * next(calls)) == "they differ"
    assert reason_or_recording(lambda x, i: x * torch.tensor(next(calls))) == "they differ"
    assert reason_or_recording(lambda x, i: x * 2 if next(calls) % 2 else x + 2) == "they differ"


def test_a_tensor_of_the_batch_that_was_not_given_is_not_taken() -> None:
    """Such as what comes out of a function that PyTorch does not see."""
    assert reason_or_recording(lambda x, i: torch.from_numpy(COUNTED.numpy() + 1) * x) == "Tensor.numpy"
    batches = [torch.ones(8), torch.zeros(8)]
    assert reason_or_recording(lambda x, i: batches.pop() * x) == "they differ"


def test_an_output_that_nothing_gave_is_refused() -> None:
    with Recorder([]) as recorder:
        pass
    recorder.place_of(torch.ones(2))
    assert recorder.recording.obstacle is not None


def test_constants_are_read_when_it_runs() -> None:
    """Weights may be updated in place."""
    weight = torch.ones(8)
    found = reason_or_recording(lambda x, i: x * weight)
    assert not isinstance(found, str), found
    weight.fill_(3)
    given = inputs(5)
    assert torch.equal(found[0].run(given)[found[1]], given[0] * 3)


def test_other_threads_are_not_recorded() -> None:
    x = torch.ones(2, 2)

    def beside(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: reads_what_it_likes(x, [], 1))
        thread.start()
        thread.join()
        return x * 1

    alone, _ = record(lambda x, i: x * 1, [x, x])
    with_thread, _ = record(beside, [x, x])
    assert with_thread.obstacle is None
    assert with_thread.agrees_with(alone)
