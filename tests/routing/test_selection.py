import numpy as np
import pytest

from mttl_routing.merges.selection import nth_largest

SIZE = 100_003


def numbers(kind: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(SIZE).astype(np.float32)
    if kind == "zero-heavy":
        values[generator.random(SIZE) < 0.9] = 0.0
    elif kind == "equal":
        values[:] = 1.5
    elif kind == "few levels":
        values = np.round(values * 2)
    elif kind == "sorted":
        values.sort()
    elif kind == "sample misleads":  # it looks at every seventh
        values[::7] += 100.0
    elif kind == "outliers":
        values[:5] = np.inf
    return values


@pytest.mark.parametrize(
    "kind",
    ["normal", "zero-heavy", "equal", "few levels", "sorted", "sample misleads", "outliers"],
)
def test_it_is_what_sorting_gives(kind):
    values = numbers(kind)
    falling = np.sort(values)[::-1]
    for n in (1, 2, 17, SIZE // 10, SIZE // 5, SIZE // 2, SIZE - 1, SIZE):
        assert nth_largest(values, n) == falling[n - 1]


def test_few_numbers_too():
    assert nth_largest(np.array([3.0, 1.0, 2.0], dtype=np.float32), 2) == 2.0
