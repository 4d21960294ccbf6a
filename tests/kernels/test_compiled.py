"""The exponential of the compiled loops against float64."""

from typing import Any

import numpy as np
from numba import njit

from bdlora_kernels.compiled import FASTMATH, exp


@njit(fastmath=FASTMATH, error_model="numpy")  # type: ignore[untyped-decorator]
def exp_of_each(x: Any, y: Any) -> None:
    for i in range(x.size):
        y[i] = exp(x[i])


def test_exp() -> None:
    x = np.linspace(-87.3, 88.3, 1_000_001).astype(np.float32)
    y = np.empty_like(x)
    exp_of_each(x, y)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(y - exact) / np.spacing(exact.astype(np.float32))) < 2
    assert np.all(np.diff(y) >= 0)


def test_exp_where_a_float32_ends() -> None:
    x = np.array([0, -0.0, -87.7, -1e30, -np.inf, 89, 1e30, np.inf, np.nan], np.float32)
    y = np.empty_like(x)
    exp_of_each(x, y)
    np.testing.assert_array_equal(y, np.array([1, 1, 0, 0, 0, np.inf, np.inf, np.inf, np.nan], np.float32))
