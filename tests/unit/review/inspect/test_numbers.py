"""Maps and numbers of a case against plain numpy, voxel by voxel."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import CacheMissing
from pipeline.review.inspect.look import View, look_at
from pipeline.review.inspect.numbers import lazy_numbers, measure_case, numbers_of
from pipeline.review.inspect.run import compute_maps
from tests.unit.consensus.slow_consensus import slow_average, slow_labels_win, slow_regions
from tests.unit.review.inspect.made_cases import SPACE, made_case, random_case

ORGANS = ("liver", "spleen", "kidneys")
MARGIN = 0.75


def votes_of(votes: dict[Any, Any], heat: dict[Any, float]) -> dict[Any, Any]:
    return {key: odds.astype(np.float32) / heat.get(key, 1.0) for key, odds in votes.items()}


@pytest.mark.parametrize("labels_win", [True, False])
@pytest.mark.parametrize("heat", [{}, {("two", "liver"): 2.0}], ids=["plain", "calibrated"])
def test_every_number_and_map_is_what_numpy_says(
    tmp_path: Path, labels_win: bool, heat: dict[Any, float]
) -> None:
    case, raw, label = random_case(tmp_path)
    view = View(MARGIN, labels_win, 6.0, heat)
    look = look_at(case, SPACE, view)
    lazy = lazy_numbers(case, look)
    found, computed = compute_maps(case, look, lazy.arrays)
    numbers = numbers_of(case, look, lazy, computed)
    assert numbers == measure_case(case, SPACE, view)

    votes = votes_of(raw, heat)
    alone = np.stack([slow_average([v for (_, o), v in votes.items() if o == k]) for k in ORGANS])
    d = slow_labels_win(alone, label, [0], 6.0) if labels_win else alone
    regions = slow_regions(d, MARGIN)
    known = label != 255
    false = [(alone[k] > MARGIN) & known & (label != 1) for k in range(1)]
    false += [(alone[k] > MARGIN) & (label == 1) for k in (1, 2)]
    missed = (label == 1) & ~(alone[0] > MARGIN)
    swallowed = (label == 1) & (alone < -MARGIN).all(axis=0)

    # One voxel is 1 ml.
    for k, organ in enumerate(ORGANS):
        assert numbers.organs[organ].region_ml == regions["organ"][k].sum()
        assert numbers.organs[organ].false_positive_ml == false[k].sum()
    liver = numbers.organs["liver"]
    assert (liver.label_ml, liver.missed_ml) == ((label == 1).sum(), missed.sum())
    assert liver.swallowed_ml == swallowed.sum() > 0
    assert numbers.organs["spleen"].label_ml is None
    assert numbers.agreed_background == pytest.approx(regions["background"].mean(), abs=1e-6)
    assert numbers.unclaimed == pytest.approx(regions["unclaimed"].mean(), abs=1e-6)
    assert numbers.unclaimed > numbers.agreed_background
    assert numbers.conflict_ml == regions["conflict"].sum()
    assert numbers.abstained_ml == regions["abstained"].sum()
    assert numbers.unseen == pytest.approx(np.isnan(alone).any(axis=0).mean(), abs=1e-6)
    one, two = votes["one", "liver"], votes["two", "liver"]
    split = ((one > MARGIN) & (two < -MARGIN)) | ((two > MARGIN) & (one < -MARGIN))
    assert liver.split_ml == split.sum() > 0
    assert numbers.organs["kidneys"].split_ml is None
    for entry in numbers.teachers:
        own = votes[entry.teacher, entry.organ]
        assert entry.claimed_ml == (own > MARGIN).sum()
        assert entry.unseen == pytest.approx(np.isnan(own).mean(), abs=1e-6)
    check_pairs(numbers, votes, label, labels_win)

    maps = found.maps
    ids = np.array([1, 5, 7], np.uint8)
    surest = ids[np.where(regions["organ"], d, -np.inf).argmax(axis=0)]
    wanted = np.where(regions["organ"].any(axis=0), surest, 0)
    np.testing.assert_array_equal(maps["regions"], wanted)
    np.testing.assert_array_equal(maps["agreed_background"], regions["background"])
    np.testing.assert_array_equal(maps["abstained"], regions["abstained"])
    count = regions["organ"].sum(axis=0)
    np.testing.assert_array_equal(maps["conflicts"], np.where(count > 1, count, 0))
    np.testing.assert_array_equal(maps["against_label"], np.any(false, axis=0) + 2 * missed)
    np.testing.assert_array_equal(maps["split_experts"], split)
    spread = np.where(np.isnan(one) | np.isnan(two), 0, np.abs(one - two))
    np.testing.assert_array_equal(maps["spread"], spread)


def check_pairs(numbers: Any, votes: dict[Any, Any], label: Any, labels_win: bool) -> None:
    claims = {}
    for (teacher, organ), d in votes.items():
        claim = d > MARGIN
        if labels_win:
            claim &= (label == 255) | (label != 1) if organ != "liver" else np.isin(label, [1, 255])
        claims[teacher, organ] = claim
    wanted = {}
    for a, b in combinations(("one", "two", "three"), 2):
        both = np.zeros(label.shape, bool)
        for (teacher, organ), claim in claims.items():
            for (other, another), counter in claims.items():
                if (teacher, other) == (a, b) and organ != another:
                    both |= claim & counter
        wanted[frozenset((a, b))] = both.sum()
    found = {frozenset(pair.teachers): pair.conflict_ml for pair in numbers.pairs}
    assert found == wanted
    assert min(wanted.values()) > 0


def test_nothing_is_read_before_compute_and_every_voxel_once(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    case, _, label = random_case(tmp_path)
    look = look_at(case, SPACE, View())
    lazy = lazy_numbers(case, look)
    look.region_ids(), look.against_label(), look.spread()
    assert not reads
    compute_maps(case, look, lazy.arrays)
    odds = [(name, size) for name, size in reads if "log_odds" in name]
    assert {name for name, _ in odds} == {
        "one/log_odds/liver", "two/log_odds/liver", "two/log_odds/spleen", "three/log_odds/kidneys",
    }  # fmt: skip
    assert sum(size for _, size in odds) == 4 * label.size
    assert max(size for _, size in odds) <= 8**3, "chunk by chunk"


def test_organs_without_an_expert_are_neither_missed_nor_swallowed(tmp_path: Path) -> None:
    label = np.zeros((4, 4, 4), int)
    label[0] = 1
    case = made_case(
        tmp_path, "a/b", {("one", "spleen"): np.full(label.shape, -3.0)}, label, ["liver"]
    )
    numbers = measure_case(case, SPACE, View())
    liver = numbers.organs["liver"]
    assert (liver.region_ml, liver.label_ml, liver.missed_ml) == (16, 16, None)
    assert numbers.unseen == 0
    assert numbers.agreed_background == 0.75


def test_a_case_that_no_teacher_has_seen_says_what_to_run(tmp_path: Path) -> None:
    case = made_case(tmp_path, "a/b", {}, np.zeros((4, 4, 4)), ["liver"])
    with pytest.raises(CacheMissing, match=r"a/b: .*Run `pipeline cache-teachers`"):
        look_at(case, SPACE, View())
