from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.log import Log
from pipeline.review.inspect.look import View
from pipeline.review.inspect.numbers import (
    CaseNumbers,
    CohortNumbers,
    OrganNumbers,
    PairNumbers,
    flagged,
    measure_cohort,
    pair_rows,
    usual_of,
)
from tests.unit.review.inspect.made_cases import SPACE, made_case

QUIET = Log(quiet=True)
SHAPE = (12, 12, 12)


def numbers(name: str, split: str = "train", **organs: OrganNumbers) -> CaseNumbers:
    return CaseNumbers(
        case=name, split=split, volume_ml=1000, organs=organs, agreed_background=0.9,
        unclaimed=0.9,
        conflict_ml=0, abstained_ml=0, unseen=0, teachers=(), pairs=(),
    )  # fmt: skip


def labelled(ml: float, components: int = 1, **changes: Any) -> OrganNumbers:
    values: dict[str, Any] = {
        "region_ml": ml, "components": components, "label_ml": ml,
        "label_components": components, "missed_ml": 0.0, "swallowed_ml": 0.0,
    }  # fmt: skip
    return OrganNumbers(**values | changes)


def unlabelled(ml: float, components: int = 1) -> OrganNumbers:
    return OrganNumbers(region_ml=ml, components=components)


LABELS = [numbers(f"a/{n}", liver=labelled(100 + n, 1 + n % 2)) for n in range(41)]


@pytest.mark.parametrize(
    ("liver", "reason"),
    [
        (unlabelled(100), ""),
        (unlabelled(0), "region is empty"),
        (unlabelled(300), "300 ml, while 41 labels show 102 to 138 ml"),
        (unlabelled(40), "40 ml, while"),
        (unlabelled(100, 3), "3 large separate parts, more than any label has (2)"),
        (labelled(0), ""),
        (labelled(120, missed_ml=60.0), ""),
        (labelled(120, missed_ml=66.0), "miss 55% of the labelled organ"),
        (labelled(120, missed_ml=50.0, swallowed_ml=48.0), "holds 40% of the label"),
    ],
)
def test_reasons(liver: OrganNumbers, reason: str) -> None:
    flags = flagged(numbers("b/c", liver=liver), usual_of(LABELS)).flags
    assert len(flags) == bool(reason)
    assert all(flag.startswith("liver: ") and reason in flag for flag in flags)


def test_one_slipped_label_does_not_make_every_size_usual() -> None:
    slipped = [*LABELS, numbers("a/slipped", liver=labelled(0.1))]
    assert flagged(numbers("b/c", liver=unlabelled(20)), usual_of(slipped)).flags


def test_test_cases_say_nothing_of_what_is_usual() -> None:
    assert usual_of([numbers("a/b", "test", liver=labelled(100))])["liver"].label_ml is None


def test_without_any_label_only_the_case_itself_speaks() -> None:
    assert not flagged(numbers("b/c", liver=unlabelled(1e6, 2)), {}).flags
    assert "3 large" in flagged(numbers("b/c", liver=unlabelled(100, 3)), {}).flags[0]


# --- a planted bad teacher ------------------------------------------------------------------------


def ball(centre: tuple[int, int, int]) -> Any:
    where = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    return sum((w - c) ** 2 for w, c in zip(where, centre, strict=True)) <= 9


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> CohortNumbers:
    """Livers are labelled in `livers`, spleens in `spleens`; the teacher of spleens finds nothing
    in one case of `livers`, fills the upper half of another, and misses the label of a spleen."""
    folder = tmp_path_factory.mktemp("planted")
    liver, spleen = ball((5, 5, 3)), ball((5, 5, 9))
    odd = {
        "livers/none": np.zeros(SHAPE, bool),
        "livers/half": np.arange(SHAPE[0])[:, None, None] * np.ones(SHAPE) > 5,
        "spleens/missed": ball((9, 5, 3)),
    }
    cases = []
    for name in ("livers/a", "livers/half", "livers/none", "spleens/a", "spleens/missed"):
        organ = name.split("/")[0].removesuffix("s")
        label = np.where(liver, 1, 0) if organ == "liver" else np.where(spleen, 5, 0)
        votes = {
            ("good", "liver"): np.where(liver, 8.0, -8.0),
            ("bad", "spleen"): np.where(odd.get(name, spleen), 8.0, -8.0),
        }
        cases.append(made_case(folder, name, votes, label, [organ]))
    return measure_cohort(cases, SPACE, View(), workers=0, log=QUIET)


def test_the_bad_teachers_cases_come_first_and_say_why(planted: CohortNumbers) -> None:
    flags = {case.case: " ".join(case.flags) for case in planted.cases}
    assert not planted.failed
    assert planted.num_improbable == 3
    assert set(list(flags)[:3]) == {"livers/none", "livers/half", "spleens/missed"}
    assert flags["livers/none"].startswith("spleen: the region is empty")
    assert "817 ml, while 2 labels show 122 to 122 ml" in flags["livers/half"]
    assert "miss 100% of the labelled organ, agreed background" in flags["spleens/missed"]
    assert not flags["livers/a"]
    assert not flags["spleens/a"]


def test_pairs_are_told_with_their_worst_case() -> None:
    def case(name: str, **conflict_ml: float) -> CaseNumbers:
        pairs = [
            PairNumbers(teachers=(p[0], p[1]), conflict_ml=ml) for p, ml in conflict_ml.items()
        ]
        return numbers(name).model_copy(update={"pairs": tuple(pairs)})

    rows = pair_rows([case("a/a", xy=1, xz=0), case("a/b", xy=4, xz=9), case("a/c", xy=0, xz=0)])
    assert [row["teachers"] for row in rows] == [["x", "z"], ["x", "y"]]
    assert rows[1] == {
        "teachers": ["x", "y"], "conflict_ml": 5.0, "num_cases": 2,
        "worst_ml": 4.0, "worst_case": "a/b",
    }  # fmt: skip


def test_processes_find_the_same(planted: CohortNumbers, tmp_path: Path) -> None:
    votes = {("good", "liver"): np.where(ball((5, 5, 3)), 8.0, -8.0)}
    label = np.where(ball((5, 5, 4)), 1, 0)
    cases = [made_case(tmp_path, f"livers/{n}", votes, label, ["liver"]) for n in "ab"]
    here, there = (measure_cohort(cases, SPACE, View(), workers=w, log=QUIET) for w in (0, 1))
    assert here == there
    assert here.cases[0].organs["liver"].missed_ml
