"""What follows from the evidence, on numbers made up by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cache.index import IndexedCase
from pipeline.consensus.evidence import (
    Circumstances,
    Evidence,
    GateCases,
    OrganEvidence,
    Region,
    Score,
    plan_gate_cases,
    units_of,
)
from pipeline.consensus.gate import acceptance, elsewhere_rows, refusals, score_rows
from pipeline.data.registry import Registry, load_registry
from pipeline.errors import RegistryError


def registry_of(folder: Path, **changes: Any) -> Registry:
    files = {"root": "r", "images": "i/{case}.nii.gz", "labels": "l/{case}.nii.gz"}
    teacher = {"kind": "checkpoint", "weights": "w.pt"}
    data: dict[str, Any] = {
        "schema_version": 1,
        "organs": {"liver": 1, "spleen": 2},
        "grid": {"spacing_mm": [3, 3, 3]},
        "datasets": {
            "livers": {**files, "annotated": {"liver": 1}},
            "spleens": {**files, "annotated": {"spleen": 1}},
            "both": {**files, "annotated": {"liver": 1, "spleen": 2}},
        },
        "teachers": {
            "liver": {**teacher, "organs": {"liver": 1}},
            "two": {**teacher, "organs": {"liver": 1, "spleen": 2}},
        },
    }
    path = folder / "registry.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}))
    return load_registry(path, files=False)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_of(tmp_path)


def cases(dataset: str, split: str, *numbers: int) -> list[IndexedCase]:
    return [
        IndexedCase(dataset, f"case_{n}", split, f"{(7 * n) % 10}" * 64, f"{dataset} {n}")
        for n in numbers
    ]


def evidence(
    scores: dict[str, float | None],
    regions: dict[str, float] | None = None,
    *,
    label_ml: tuple[float, float] | None = (100.0, 200.0),
    spacing_mm: tuple[float, float, float] | None = None,
    cases: dict[str, tuple[float, tuple[float, float]]] | None = None,
    teacher: str = "liver",
) -> Evidence:
    """Case -> Dice, case -> ml, and case -> (isotropic spacing, HU percentiles)."""
    usual = (2.0, (-1000.0, 300.0))
    names = [*scores, *(regions or {})]
    like = {name: (cases or {}).get(name, usual) for name in names}
    organ = OrganEvidence(
        split="validation",
        scored=tuple(
            Score(case=c, dice=d, sensitivity=d, region_ml=150.0) for c, d in scores.items()
        ),
        elsewhere=tuple(Region(case=c, region_ml=ml) for c, ml in (regions or {}).items()),
        label_ml=label_ml,
        calibration=None,
    )
    return Evidence(
        teacher=teacher,
        teacher_digest="d",
        spacing_mm=spacing_mm,
        organs={"liver": organ},
        cases={c: Circumstances(spacing_mm=(mm,) * 3, hu=hu) for c, (mm, hu) in like.items()},
        unread=(),
    )


# --- what is looked at ----------------------------------------------------------------------------


def test_all_validation_cases_with_a_label_and_a_few_others(registry: Registry) -> None:
    known = [
        *cases("livers", "train", 0, 1, 2),
        *cases("livers", "validation", 3, 4),
        *cases("both", "validation", 5),
        *cases("both", "test", 6),
        *cases("spleens", "train", 0, 1, 2, 3, 4),
        *cases("spleens", "test", 5),
    ]
    look = next(x for x in plan_gate_cases(registry, known) if x.teacher == "liver")
    assert look.split == "validation"
    names = {case.name for case in look.scored}
    assert names == {"livers/case_3", "livers/case_4", "both/case_5"}
    # image digests 0, 7, 4, 1, 8: the first three are those of cases 0, 3 and 2; no test case
    assert [case.name for case in look.elsewhere] == [f"spleens/case_{n}" for n in (0, 3, 2)]
    assert len(look.labelled) == 6
    assert units_of([look]) == {("liver", c.name) for c in (*look.scored, *look.elsewhere)}


def test_training_cases_only_where_no_dataset_has_a_validation_case(registry: Registry) -> None:
    known = [*cases("livers", "train", 0, 1, 2, 3), *cases("spleens", "validation", 5)]
    looks = {(x.teacher, x.organ): x for x in plan_gate_cases(registry, known)}
    liver: GateCases = looks["two", "liver"]
    assert (liver.split, len(liver.scored)) == ("train", 3)
    assert looks["two", "spleen"].split == "validation"
    nobody = plan_gate_cases(registry, cases("livers", "test", 0))
    assert {(x.split, x.scored, x.elsewhere) for x in nobody} == {(None, (), ())}


# --- against labels -------------------------------------------------------------------------------


def test_the_mean_of_each_dataset_is_held_against_the_threshold(registry: Registry) -> None:
    found = evidence({"livers/a": 0.9, "livers/b": 0.2, "both/a": 0.4, "both/b": None})
    rows = score_rows(registry, [found])
    assert [(r["dataset"], r["num_cases"], r["dice"], r["passed"]) for r in rows] == [
        ("livers", 2, 0.55, True),
        ("both", 1, 0.4, False),
    ]
    assert rows[0]["flag"] == ""
    assert rows[1]["flag"] == "POOR: Dice below 0.5"


def test_a_refusal_says_who_what_how_much_and_what_to_do(registry: Registry) -> None:
    rows = score_rows(registry, [evidence({"livers/a": 0.25, "livers/b": 0.0})])
    error = refusals(rows)["liver"]
    assert error.exit_code == 2
    for part in (
        "teacher liver: liver has a mean Dice of 0.125 (sensitivity 0.125) over 2 validation cases "
        "of livers, below 0.5.",
        "channels", "spacing", "intensity", "--accept liver", "take it out",
    ):  # fmt: skip
        assert part in str(error)


def test_exactly_the_threshold_passes(registry: Registry) -> None:
    assert refusals(score_rows(registry, [evidence({"livers/a": 0.5})])) == {}


def test_a_teachers_own_threshold_wins(tmp_path: Path) -> None:
    teacher = {"kind": "checkpoint", "weights": "w.pt", "organs": {"liver": 1, "spleen": 2}}
    strict = registry_of(
        tmp_path,
        admission={"dice": 0.3},
        teachers={"liver": {**teacher, "admission": {"dice": 0.8}}, "two": teacher},
    )
    both = [evidence({"livers/a": 0.6}), evidence({"livers/a": 0.6}, teacher="two")]
    assert set(refusals(score_rows(strict, both))) == {"liver"}


def test_an_accepted_teacher_is_not_refused_and_its_worst_dataset_is_noted(
    registry: Registry,
) -> None:
    rows = score_rows(registry, [evidence({"livers/a": 0.25, "both/a": 0.125})], ["liver"])
    assert refusals(rows) == {}
    assert {row["flag"] for row in rows} == {"POOR: Dice below 0.5, accepted"}
    noted = acceptance(rows)["liver"]["liver"]
    assert (noted["dice"], noted["threshold"], noted["dataset"]) == (0.125, 0.5, "both")


def test_accepting_a_good_teacher_notes_nothing(registry: Registry) -> None:
    rows = score_rows(registry, [evidence({"livers/a": 0.9})], ["liver"])
    assert acceptance(rows) == {}
    assert rows[0]["accepted"] is False


@pytest.mark.parametrize("scores", [{}, {"livers/a": None}])
def test_who_cannot_be_scored_passes_and_is_said_so(
    registry: Registry, scores: dict[str, float | None]
) -> None:
    (row,) = score_rows(registry, [evidence(scores)])
    assert (row["dice"], row["passed"]) == (None, None)
    assert row["flag"].startswith("not scored")
    assert refusals([row]) == {}


# --- where there is no label ----------------------------------------------------------------------


def odd(**options: Any) -> dict[str, Any]:
    regions = options.pop("regions", {"spleens/a": 150.0, "spleens/b": 150.0})
    (row,) = elsewhere_rows([evidence({"livers/a": 0.9}, regions, **options)])
    return row


def test_nothing_odd() -> None:
    row = odd()
    assert (row["num_cases"], row["median_ml"], row["flag"]) == (2, 150.0, "")


def test_no_organ_found() -> None:
    row = odd(regions={"spleens/a": 0.0, "spleens/b": 0.0, "spleens/c": 150.0})
    assert (row["empty"], row["odd_volume"]) == (2, 0)
    assert row["flag"] == "IMPLAUSIBLE: no organ found in 2 of 3"


@pytest.mark.parametrize(("ml", "num"), [(49, 1), (51, 0), (399, 0), (401, 1)])
def test_volumes_far_outside_what_labels_show(ml: float, num: int) -> None:
    assert odd(regions={"spleens/a": ml})["odd_volume"] == num
    assert odd(regions={"spleens/a": ml}, label_ml=None)["odd_volume"] == 0


def test_fewer_than_half_of_the_cases_are_no_reason_to_cry() -> None:
    row = odd(regions={"spleens/a": 0.0, "spleens/b": 150.0, "spleens/c": 150.0})
    assert row["flag"] == "no organ found in 1 of 3"


@pytest.mark.parametrize(
    ("spacing_mm", "mm", "num"),
    [((1.0, 1.0, 1.0), 2.5, 2), ((1.5, 1.5, 1.5), 2.5, 0), (None, 4.1, 2), (None, 3.9, 0)],
)
def test_coarser_than_the_network_knows(
    spacing_mm: tuple[float, float, float] | None, mm: float, num: int
) -> None:
    like = dict.fromkeys(("spleens/a", "spleens/b"), (mm, (-1000.0, 300.0)))
    assert odd(cases=like, spacing_mm=spacing_mm)["odd_spacing"] == num


@pytest.mark.parametrize(
    ("hu", "num"), [((-1000, 300), 0), ((24, 1324), 2), ((0, 255), 2), ((-800, 500), 0)]
)
def test_values_that_are_not_hounsfield_units(hu: tuple[float, float], num: int) -> None:
    like = dict.fromkeys(("spleens/a", "spleens/b"), (2.0, hu))
    assert odd(cases=like)["odd_hu"] == num


# --- the registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"dice": 1.5}, {"dice": -0.1}, {"cases": 0}, {"dize": 0.5}])
def test_a_threshold_that_cannot_be_is_refused_with_its_line(
    tmp_path: Path, bad: dict[str, float]
) -> None:
    with pytest.raises(RegistryError, match=r"registry.yaml:\d+: admission\."):
        registry_of(tmp_path, admission=bad)
