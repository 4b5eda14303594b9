from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.labels import LabelSpace
from pipeline.student.postprocessing import (
    LEAST_CASES,
    Rule,
    best_rule,
    candidates,
    dice_by_rule,
    kept_parts,
    postprocess,
)

SPACE = LabelSpace({"liver": 2, "kidneys": 7})


def parts(*sizes: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Rows of voxels that do not touch."""
    mask = np.zeros((3, 2 * len(sizes), 20), dtype=np.bool_)
    for row, size in enumerate(sizes):
        mask[1, 2 * row, :size] = True
    return mask


@pytest.mark.parametrize(
    ("sizes", "rule", "left"),
    [
        ((9, 3, 1), "largest", [9]),
        ((9, 8, 1), 2.0, [9, 8]),
        ((9, 8, 4), 2.0, [9, 8, 4]),  # 2 ml are 4 voxels
        ((3, 2), 50.0, [3]),  # the largest stays whatever its size
        ((5,), "largest", [5]),
        ((), "largest", []),
    ],
)
def test_parts_that_stay(sizes: tuple[int, ...], rule: Rule, left: list[int]) -> None:
    mask = parts(*sizes, *[0] * (not sizes))
    kept = kept_parts(mask, rule, 0.5)
    assert [int(n) for n in kept.sum(axis=(0, 2)) if n] == left
    assert not (kept & ~mask).any()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["largest", 0.5, 3.0]))
def test_no_organ_is_removed_and_no_other_touched(seed: int, rule: Rule) -> None:
    classes = np.random.default_rng(seed).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    before = classes.copy()
    removed = postprocess(classes, SPACE, {"liver": rule}, 0.25)
    assert (classes == 1).any() == (before == 1).any()
    assert np.array_equal(classes == 2, before == 2)
    lost = (before == 1) & (classes == 0)
    assert removed == {"liver": pytest.approx(0.25 * lost.sum(), abs=1e-3)}
    assert np.array_equal(classes[~lost], before[~lost])


def test_a_rule_is_kept_where_it_raises_dice() -> None:
    reference = parts(9, 0, 0)
    rules = candidates([9.0, 4.5])
    assert rules == ["largest", 0.45]
    noisy = dice_by_rule(parts(9, 4, 1), reference, rules, 0.5)
    assert noisy == [pytest.approx(18 / 23), 1.0, pytest.approx(18 / 23)]
    assert best_rule(rules, [noisy] * LEAST_CASES) == "largest"
    assert best_rule(rules, [noisy] * (LEAST_CASES - 1)) is None
    two = dice_by_rule(parts(9, 8, 1), parts(9, 8, 0), rules, 0.4)
    assert best_rule(rules, [two] * LEAST_CASES) == 0.45
    good = dice_by_rule(reference, reference, rules, 0.5)
    assert best_rule(rules, [good] * LEAST_CASES) is None
