"""Products of 16-bit weights in float32, against float64."""

from collections.abc import Iterator

import pytest
import torch

from bdlora_sglang.serving.cpu import widened
from bdlora_sglang.serving.cpu.widened import widened_linear

# Enough for several threads.
OUTPUTS = 531
DTYPES = [torch.bfloat16, torch.float16]
# Few tokens and many; inputs that are whole lanes and such that are not; outputs that no block and no thread divides.
SHAPES = [(rows, inputs) for rows in (0, 1, 3, 4, 7, 16, 17, 33) for inputs in (64, 67)]


@pytest.fixture(params=[1, 3], ids=["1-thread", "3-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def rounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The exact product, in the type of x."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    return exact.to(x.dtype)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 64), (2, 9, 67)], ids=str)
@pytest.mark.usefixtures("threads")
def test_product(shape: tuple[int, ...], dtype: torch.dtype, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_BLOCK", 1000)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator).to(dtype) for size in ((OUTPUTS, shape[-1]), shape))
    bias = torch.randn(OUTPUTS, generator=generator).to(dtype) if has_bias else None
    y = widened_linear(x, weight, bias)
    assert y.dtype == dtype and y.shape == (*shape[:-1], OUTPUTS)
    # Float32 sums may fall on the other side of a middle between two numbers of the type.
    torch.testing.assert_close(y, rounded(x, weight, bias), rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_a_token_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    weight, x = torch.randn(OUTPUTS, 64).to(dtype), torch.randn(16, 64).to(dtype)
    together = widened_linear(x, weight)
    for token in range(len(x)):
        assert torch.equal(widened_linear(x[token : token + 1], weight)[0], together[token])


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_every_number_is_widened_exactly(dtype: torch.dtype) -> None:
    """Infinities, numbers below the smallest normal one and both zeros too; NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    weight = torch.zeros(len(every), 16, dtype=dtype)
    weight[:, 0] = every
    x = torch.zeros(1, 16, dtype=dtype)
    x[0, 0] = 1
    y = widened_linear(x, weight)[0]
    assert torch.equal(y.isnan(), every.isnan())
    assert torch.equal(y[~y.isnan()], every[~every.isnan()])


def test_a_transposed_weight_and_rows_apart() -> None:
    weight, x = torch.randn(64, 85).bfloat16().T, torch.randn(5, 128).bfloat16()[:, ::2]
    torch.testing.assert_close(widened_linear(x, weight), rounded(x, weight, None), rtol=2**-7, atol=1e-4)
