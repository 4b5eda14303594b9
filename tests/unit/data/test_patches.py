"""Windows and patches on cases small enough to be written out."""

from __future__ import annotations

import pytest

from pipeline.data.patches import Patch, window_starts, windows


def test_slices() -> None:
    assert Patch((1, 2, 3), (4, 5, 6)).slices == (slice(1, 5), slice(2, 7), slice(3, 9))


def test_coarsen() -> None:
    assert Patch((8, -4, 0), (16, 4, 2)).coarsen((8, 4, 1)) == Patch((1, -1, 0), (2, 1, 2))
    for patch in (Patch((3, 0, 0), (4, 4, 4)), Patch((0, 0, 0), (4, 4, 6))):
        with pytest.raises(ValueError, match="cells of"):
            patch.coarsen((4, 4, 4))


@pytest.mark.parametrize(
    ("size", "window", "overlap", "align", "starts"),
    [
        (10, 10, 0.5, 1, [0]),
        (10, 4, 0.0, 1, [0, 4, 6]),
        (12, 4, 0.0, 4, [0, 4, 8]),
        (10, 4, 0.5, 1, [0, 2, 4, 6]),
        (16, 8, 0.3, 4, [0, 4, 8]),
        (6, 4, 0.9, 1, [0, 1, 2]),
    ],
)
def test_window_starts(
    size: int, window: int, overlap: float, align: int, starts: list[int]
) -> None:
    assert window_starts(size, window, overlap, align) == starts


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
