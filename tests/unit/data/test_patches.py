"""Windows and patches on cases small enough to be written out."""

from __future__ import annotations

import pytest

from pipeline.data.patches import Patch, window_starts, windows


def test_slices() -> None:
    assert Patch((1, 2, 3), (4, 5, 6)).slices == (slice(1, 5), slice(2, 7), slice(3, 9))


@pytest.mark.parametrize(
    ("size", "window", "align"),
    [(4, 5, 1), (10, 4, 4), (12, 4, 8)],
    ids=["window larger than axis", "last window off the alignment", "gaps between windows"],
)
def test_windows_that_cannot_be_laid_out(size: int, window: int, align: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        window_starts(size, window, 0.5, align)


def test_windows_are_in_a_fixed_order_with_z_slowest() -> None:
    assert [p.start for p in windows((4, 4, 2), (2, 2, 2), 0.0)] == [
        (0, 0, 0),
        (0, 2, 0),
        (2, 0, 0),
        (2, 2, 0),
    ]
