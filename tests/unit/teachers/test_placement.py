"""From a teacher's slabs to the student grid: right on any grid, in bounded memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import log_odds
from pipeline.data.resample import resample
from pipeline.data.volume import Grid, Volume
from pipeline.errors import TeacherError
from pipeline.teachers import units
from pipeline.teachers.units import Placement

Array = npt.NDArray[np.float32]
WHERE = "liver x ct/case_001"


def entry(num_channels: int = 3, **changes: Any) -> TeacherEntry:
    values = {
        "kind": "checkpoint", "weights": "w", "num_channels": num_channels,
        "organs": {"liver": [1, 2], "spleen": 2}, **changes,
    }  # fmt: skip
    return TeacherEntry.model_validate(values)


def turned(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Grid:
    """An oblique grid: 20 degrees about z, then 15 about x."""
    a, b = np.deg2rad(20), np.deg2rad(15)
    about_z = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_x = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = about_z @ about_x @ np.diag(spacing)
    matrix[:3, 3] = (-40, 25, 310)
    return Grid.from_matrix(shape, matrix)


def flipped(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Grid:
    """All axes run the other way."""
    matrix = np.diag([*(-s for s in spacing), 1.0])
    matrix[:3, 3] = (100, 50, -20)
    return Grid.from_matrix(shape, matrix)


# Native CT, the spacing that the teacher wants, the student's.
CASES = {
    "oblique": (turned((20, 24, 22), (2.0, 1.0, 1.1)), (1.5, 1.5, 1.5), (3.0, 2.0, 2.0)),
    "flipped": (flipped((20, 24, 22), (2.0, 1.0, 1.1)), (1.5, 1.5, 1.5), (3.0, 2.0, 2.0)),
    "anisotropic": (
        Grid.axis_aligned((9, 60, 50), (7.5, 0.6, 0.7), (3, 2, 1)), (3.0, 1.0, 0.9),
        (5.0, 1.3, 1.4),
    ),
}  # fmt: skip


def where_it_is(grid: Grid, channel: int) -> Array:
    """A linear function of the place in mm: interpolation, of whatever grid, gives it back."""
    index = np.indices(grid.shape).reshape(3, -1)
    world = grid.matrix[:3, :3] @ index + grid.matrix[:3, 3:]
    slope = np.array([[0.02, -0.01, 0.03], [0.01, 0.02, -0.02], [-0.03, 0.01, 0.01]])[channel]
    return (slope @ world).reshape(grid.shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize(("native", "teacher_mm", "student_mm"), CASES.values(), ids=CASES)
def test_log_odds_and_features_come_to_the_right_place(
    native: Grid,
    teacher_mm: tuple[float, float, float],
    student_mm: tuple[float, float, float],
    rows: int,
) -> None:
    wanted, student = native.with_spacing(teacher_mm), native.with_spacing(student_mm)
    cells = wanted.coarsen((2, 2, 2))
    # The teacher sees all but the top and one side: beyond that, NaN.
    seen = wanted.crop((0, 0, 3), (wanted.shape[0] - 4, wanted.shape[1], wanted.shape[2] - 3))
    placed = Placement(student, entry(), seen, {"tap": cells}, where=WHERE)
    logits = np.stack([where_it_is(seen, channel) for channel in range(3)])
    feature = np.stack([where_it_is(cells, 1)])
    for begin in range(0, seen.shape[0], rows):
        placed.put_logits(logits[:, begin : begin + rows])
    for begin in range(0, cells.shape[0], rows):
        placed.feature_sinks["tap"](feature[:, begin : begin + rows])
    for organ, channels in (("liver", (1, 2)), ("spleen", (2,))):
        found = placed.log_odds[organ]
        whole = Volume(log_odds(logits, channels, "softmax"), seen)
        expected = resample(whole, student, order=1, outside=np.nan).array
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert found.shape == student.shape
        assert 0.1 < float(np.isnan(found).mean()) < 0.7
        assert not np.any(found == 0)
    stride = placed.strides["tap"]
    exact = where_it_is(student.coarsen(stride), 1)
    inside = (slice(1, -1),) * 3  # at the border the outermost cell's value holds
    np.testing.assert_allclose(placed.features["tap"][0][inside], exact[inside], atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what", ["logits", "features of tap"])
def test_no_number_is_found_in_whatever_slab(bad: float, what: str) -> None:
    """NaN means "not seen" further on, so it must never come from a network."""
    grid = Grid.axis_aligned((8, 6, 6), (2, 2, 2))
    placed = Placement(grid, entry(), grid, {"tap": grid}, where=WHERE)
    put = placed.put_logits if what == "logits" else placed.feature_sinks["tap"]
    slab = np.zeros((3, 4, 6, 6), np.float32)
    put(slab)
    slab[0, 3, 5, 5] = bad
    with pytest.raises(TeacherError, match=f"1 of 432 {what} are NaN") as caught:
        put(slab)
    assert WHERE in str(caught.value)


def test_many_channels_of_a_large_case_are_never_in_memory_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """60 channels of 160 x 64 x 64 voxels are 157 MB, one organ's log-odds on the teacher's grid
    2.6 MB (5.2 as float64): neither may be held. What is made is .33 MB per organ."""
    monkeypatch.setattr(units, "_VALUES_AT_ONCE", 250_000)  # one row, 1 MB
    native = Grid.axis_aligned((160, 64, 64), (1, 1, 1))
    student = native.with_spacing((2, 2, 2))
    organs = {f"organ {number}": number for number in range(1, 4)}
    placed = Placement(student, entry(60, organs=organs), native, {}, where=WHERE)
    slab = np.random.default_rng(0).normal(size=(60, 4, 64, 64)).astype(np.float32)
    tracemalloc.start()
    try:
        for _ in range(40):
            placed.put_logits(slab)
        made = placed.log_odds
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(array.nbytes for array in made.values()) == 3 * 80 * 32 * 32 * 4
    # The result, and what logsumexp takes for one row (its size six times over).
    assert peak < 10e6, f"{peak / 1e6:.1f} MB"
