"""Whose word counts in which case, on numbers made up by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.reader import FULL, CachedCase, ReliabilityConfig, Trust
from pipeline.consensus.cohort import compute, known_organs, lazy_consensus
from pipeline.consensus.evidence import OrganEvidence, Score
from pipeline.consensus.reliability import (
    UNKNOWN,
    ClaimedRegion,
    ValidationScore,
    ignored_claims,
    precision,
    region_of,
    remarks,
    trust_of,
    trusting,
    usual_ml,
    validation_score,
)
from tests.unit.review.inspect.made_cases import SPACE, made_case

STRICT = ReliabilityConfig(least_found=0.6, least_right=0.4)
GOOD = ValidationScore(0.9, 0.9, "both", "both", 3)
USUAL = (100.0, 200.0)


def score(case: str, hits: int, region: int, label: int) -> Score:
    """In voxels of 1 ml."""
    dice = 2 * hits / (region + label) if label else None
    found = hits / label if label else None
    return Score(case=case, dice=dice, sensitivity=found, region_ml=float(region))


def evidence(*scores: Score) -> OrganEvidence:
    return OrganEvidence(
        split="validation", scored=scores, elsewhere=(), label_ml=None, calibration=None
    )


class TestWitness:
    @pytest.mark.parametrize(("hits", "region", "label"), [(30, 40, 60), (7, 7, 100), (5, 50, 5)])
    def test_precision_follows_from_dice_and_sensitivity(
        self, hits: int, region: int, label: int
    ) -> None:
        assert precision(score("a/b", hits, region, label)) == pytest.approx(hits / region)

    def test_an_empty_claim_has_none_and_a_wrong_one_has_zero(self) -> None:
        assert precision(score("a/b", 0, 0, 60)) is None
        assert precision(score("a/b", 0, 10, 60)) == 0

    def test_the_worst_dataset_counts_on_each_side(self) -> None:
        seen = validation_score(
            evidence(
                score("own/a", 90, 100, 100), score("own/b", 90, 300, 100),
                score("both/a", 0, 0, 100), score("both/b", 40, 40, 100),
                score("both/c", 0, 50, 0),  # an organ that is not there tells nothing here
            )
        )  # fmt: skip
        assert seen == ValidationScore(pytest.approx(0.2), pytest.approx(0.6), "both", "own", 4)

    def test_without_a_label_nothing_is_known(self) -> None:
        assert validation_score(evidence(score("both/c", 0, 50, 0))) == UNKNOWN


class TestTrust:
    @pytest.mark.parametrize(
        ("seen", "region", "here", "not_here", "says"),
        [
            (GOOD, ClaimedRegion(150, 1), True, True, ""),
            (UNKNOWN, ClaimedRegion(150, 1), True, True, ""),
            (
                replace(GOOD, found=0.59),
                ClaimedRegion(150, 1),
                True,
                False,
                "finds 59% of it on both",
            ),
            (
                replace(GOOD, right=0.39),
                ClaimedRegion(150, 1),
                False,
                True,
                "39% of its claims are right",
            ),
            (GOOD, ClaimedRegion(49, 1), True, False, "claims 49 ml, labels show 100 to 200"),
            (GOOD, ClaimedRegion(0, 0), True, False, "claims 0 ml"),
            (GOOD, ClaimedRegion(401, 1), False, True, "claims 401 ml"),
            (GOOD, ClaimedRegion(150, 3), False, True, "falls apart into 3 parts"),
            (replace(GOOD, found=0.1), ClaimedRegion(401, 1), False, False, "finds 10%"),
        ],
    )
    def test_each_side_fails_by_itself(
        self, seen: ValidationScore, region: ClaimedRegion, here: bool, not_here: bool, says: str
    ) -> None:
        found = trust_of(seen, region, USUAL, STRICT)
        assert (found.here, found.not_here) == (here, not_here)
        assert says in found.why
        assert found.ignored == (not here and not not_here)

    def test_plausibility_can_be_off_and_needs_a_label(self) -> None:
        off = STRICT.model_copy(update={"plausible": False})
        assert trust_of(GOOD, ClaimedRegion(0, 9), USUAL, off) == FULL
        assert trust_of(GOOD, ClaimedRegion(0, 1), None, STRICT) == FULL


# --- on cases -------------------------------------------------------------------------------------

SHAPE = (4, 6, 5)


def odds(num_inside: int) -> np.ndarray:
    """4 in the first voxels, -4 in the others, of which one was not seen."""
    values = np.full(SHAPE, -4.0, np.float16)
    values.ravel()[:num_inside] = 4
    values[-1, -1, -1] = np.nan
    return values


def case_of(folder: Path, name: str, spleen: int, *, annotated: str = "liver") -> CachedCase:
    """Teachers of liver (30 voxels) and spleen; the label has 30 voxels of what is annotated."""
    label = np.zeros(SHAPE, np.uint8)
    label.ravel()[:30] = SPACE.ids[annotated]
    votes = {("one", "liver"): odds(30), ("two", "spleen"): odds(spleen)}
    return made_case(folder, name, votes, label, [annotated])


SCORES = {("one", "liver"): GOOD, ("two", "spleen"): GOOD}


class TestCases:
    def cases(self, folder: Path) -> list[CachedCase]:
        return [
            case_of(folder, "livers/fine", 30),
            case_of(folder, "livers/missed", 3),
            case_of(folder, "spleens/own", 3, annotated="spleen"),
        ]

    def test_a_missed_organ_is_no_background_that_anybody_agrees_on(self, tmp_path: Path) -> None:
        cases = self.cases(tmp_path)
        fine, missed, own = trusting(cases, cases, SCORES, ReliabilityConfig())
        assert fine.trust == {}
        assert own.trust == {}  # there the label wins
        assert missed.trust["two", "spleen"][:2] == (True, False)
        plain, _ = lazy_consensus(cases[1], SPACE)
        found, _ = lazy_consensus(missed, SPACE)
        before, after, agreed, unclaimed = compute(
            plain.log_odds, found.log_odds, found.background, found.unclaimed
        )
        said = after[1]
        assert np.isnan(said[~(odds(3) > 0) & (before[1] > -6)]).all()
        assert (said[odds(3) > 0] == before[1][odds(3) > 0]).all()
        # The label says liver there, and so that it is no spleen, whoever is silent.
        assert (said.ravel()[3:30] == -6).all()
        assert agreed.sum() == 0
        assert unclaimed.sum() == SHAPE[0] * SHAPE[1] * SHAPE[2] - 30

    def test_one_slice_may_show_anything_of_an_organ(self, tmp_path: Path) -> None:
        """Nothing, a little, in pieces; but no more than the sections that labels show."""

        def flat(name: str, claimed: Sequence[int], annotated: str = "liver") -> CachedCase:
            label = np.zeros((1, 12, 10), np.uint8)
            label[0, :3] = SPACE.ids[annotated]
            said = np.full(label.shape, -4.0, np.float16)
            said.ravel()[list(claimed)] = 4
            return made_case(tmp_path, name, {("two", "spleen"): said}, label, [annotated])

        cases = [
            flat("livers/none", []),
            flat("livers/pieces", [0, 5, 40, 45, 80]),
            flat("livers/all", range(99)),
            flat("spleens/own", range(30), "spleen"),
        ]
        volume = case_of(tmp_path, "spleens/volume", 30, annotated="spleen")
        assert usual_ml([*cases, volume], "spleen") == pytest.approx((30, 30))
        assert usual_ml(cases, "spleen") is None
        assert usual_ml(cases, "spleen", of_slices=True) == pytest.approx((0, 30))
        found = trusting(cases, [*cases, volume], SCORES, ReliabilityConfig())
        assert [list(case.trust) for case in found] == [[], [], [("two", "spleen")], []]
        assert found[2].trust["two", "spleen"][:2] == (False, True)

    def test_who_is_silent_altogether_is_no_expert(self, tmp_path: Path) -> None:
        poor = SCORES | {("two", "spleen"): replace(GOOD, found=0.1, right=0.1)}
        cases = self.cases(tmp_path)
        fine, missed, own = trusting(cases, cases, poor, ReliabilityConfig())
        assert known_organs(fine, SPACE) == known_organs(missed, SPACE) == [0]
        assert known_organs(own, SPACE) == [0, 1]
        assert ignored_claims([fine]) == {"two x livers/fine: spleen": [False, False]}
        (said,) = remarks([fine, missed, own], poor)
        assert said == (
            "teacher two, spleen: adds nothing here (finds 10% on both); trained without it "
            "wherever no label speaks of the organ."
        )

    def test_the_remark_counts_cases_by_side(self, tmp_path: Path) -> None:
        cases = self.cases(tmp_path)
        found = trusting(cases, cases, SCORES, ReliabilityConfig())
        assert remarks(found, SCORES) == [
            'teacher two, spleen (finds 90% on both): of 2 cases, 1 without its "not here".'
        ]
        assert remarks(cases, SCORES) == []

    def test_a_dataset_on_which_a_teacher_adds_nothing_is_named(self, tmp_path: Path) -> None:
        scattered = case_of(tmp_path, "elsewhere/missed", 3)
        silent = Trust(here=False, not_here=False, why="")
        cases = [*self.cases(tmp_path), replace(scattered, trust={("two", "spleen"): silent})]
        (said,) = remarks(cases, SCORES)
        assert said == (
            "teacher two, spleen (finds 90% on both): of 3 cases, 1 without it, "
            "so it adds nothing on elsewhere."
        )

    def test_sizes_of_labels_and_claims(self, tmp_path: Path) -> None:
        cases = self.cases(tmp_path)
        assert usual_ml(cases, "liver") == pytest.approx((30, 30))
        assert usual_ml(cases, "kidneys") is None
        unit = cases[1].teachers["two"]
        assert region_of(unit, "spleen") == ClaimedRegion(pytest.approx(3), 1)
        noted = {**unit.noted, "regions": {"spleen": {"voxels": 7, "parts": 2}}}
        vars(unit)["noted"] = noted
        assert region_of(unit, "spleen") == ClaimedRegion(pytest.approx(7), 2)
