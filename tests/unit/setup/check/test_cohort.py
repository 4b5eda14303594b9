"""Cases against each other: doubles, empty organs, sizes and sides."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.data.entries import DatasetEntry
from pipeline.setup.check.cases import CaseFacts, Finding
from pipeline.setup.check.cohort import (
    in_air,
    is_outlier,
    misplaced,
    missing_organ,
    odd_volumes,
    same_voxels,
    torn_patients,
    visits,
)


def case(name: str, split: str = "train", **known: Any) -> CaseFacts:
    return CaseFacts(name, name.split("/")[0], split, **known)


def livers(*sizes: float, dataset: str = "a") -> list[CaseFacts]:
    return [case(f"{dataset}/{n}", organ_ml={"liver": ml}) for n, ml in enumerate(sizes)]


class TestSameVoxels:
    @pytest.mark.parametrize("held_out", ["validation", "test"])
    def test_in_training_and_held_out_cases_is_an_error(self, held_out: str) -> None:
        facts = [
            case("a/1", image_key="x"), case("a/2", image_key="y"),
            case("b/7", held_out, image_key="x"),
        ]  # fmt: skip
        (found,) = same_voxels(facts)
        assert (found.severity, found.where) == ("error", "a/1")
        assert f"b/7 ({held_out})" in found.what
        assert f"its own {held_out} cases" in found.what

    @pytest.mark.parametrize("other", ["fold 1", "test"])
    def test_a_fold_trains_and_validates(self, other: str) -> None:
        facts = [case("a/1", "fold 0", image_key="x"), case("b/7", other, image_key="x")]
        (found,) = same_voxels(facts)
        assert found.severity == "error"
        worst = "test" if other == "test" else "validation"
        assert f"its own {worst} cases" in found.what

    @pytest.mark.parametrize(
        "splits", [("train", "train"), ("validation", "test"), ("fold 1", "fold 1")]
    )
    def test_elsewhere_it_is_a_warning(self, splits: tuple[str, str]) -> None:
        one, other = splits
        (found,) = same_voxels([case("a/1", one, image_key="x"), case("b/1", other, image_key="x")])
        assert found.severity == "warning"

    def test_unread_images_are_no_doubles(self) -> None:
        assert same_voxels([case("a/1"), case("a/2")]) == []

    def test_a_label_of_another_case(self) -> None:
        facts = [case(f"a/{n}", image_key=str(n), label_key="same") for n in range(2)]
        (found,) = same_voxels(facts)
        assert "its label map is that of a/1" in found.what
        alike = [case(f"a/{n}", image_key="i", label_key="same") for n in range(2)]
        assert [f.kind for f in same_voxels(alike)] == ["duplicate"]


FORMS = {
    "p{p:02}_{v}": r"(.+)_",
    "case_{p:03}_{y}": r"(.+)_",
    "LIDC-{p:04}_ses-{v}": r"(.+)_",
    "sub-{p:02}_ses-{v:02}": r"(.+)_",
    "sub-{p:02}_ses-{v:02}_ct": r"(\D*\d+)",
    "pat{p}v{v}": r"(\D*\d+)",
    "{p:05}-{v}": r"(\D*\d+)",
}
PLAIN = ("case_{n:03}", "s{n:04}", "volume-{n}", "LIDC-IDRI-{n:04}", "FLARE22_Tr_{n:04}", "{n}_ct")


def entry(**split: Any) -> DatasetEntry:
    files = {"root": ".", "images": "i/{case}", "labels": "l/{case}", "annotated": {"liver": 1}}
    return DatasetEntry.model_validate(files | {"split": {"validation": 0.2, "test": 0.2} | split})


def torn(names: dict[str, list[str]], entries: dict[str, DatasetEntry]) -> list[Finding]:
    facts = [
        case(f"{dataset}/{name}", split)
        for dataset, known in names.items()
        for name, split in entries[dataset].split.assign(known).items()
    ]
    return torn_patients(facts, entries)


def group_of(found: Finding) -> str:
    return found.fix.split("`group: '")[1].split("'`")[0]


class TestPatients:
    @pytest.mark.parametrize("form", FORMS)
    def test_visits_in_two_splits_and_the_line_that_mends_it(self, form: str) -> None:
        names = [form.format(p=n // 2, v=n % 2, y=2019 + n % 2) for n in range(80)]
        (found,) = torn({"a": names}, {"a": entry()})
        assert (found.severity, found.kind, found.where) == ("warning", "split", "a")
        assert found.what.startswith("names look like scans of one patient in two splits: a/")
        assert found.fix == f"If they are, add `group: '{FORMS[form]}'` to `split`."
        mended = entry(group=group_of(found))
        assert torn({"a": names}, {"a": mended}) == []
        drawn = mended.split.assign(names)
        assert all(drawn[names[n]] == drawn[names[n + 1]] for n in range(0, 80, 2))

    @pytest.mark.parametrize("form", PLAIN)
    def test_names_that_count_cases_are_no_visits(self, form: str) -> None:
        names = [form.format(n=n) for n in range(60)]
        assert torn({"a": names, "b": names[30:]}, {"a": entry(), "b": entry(seed=1)}) == []

    def test_nor_are_those_of_a_few_organs_or_sites(self) -> None:
        assert (
            visits([f"{organ}_{n}" for organ in ("liver", "lung", "colon") for n in range(9)]) == {}
        )
        assert visits(["p00_0", "p00_1"]) == visits([]) == visits(["a"]) == {}

    def test_a_first_visit_may_have_no_number(self) -> None:
        names = [f"case_{n:03}{end}" for n in range(12) for end in ("", "_2020")]
        (found,) = torn({"a": names}, {"a": entry()})
        assert torn({"a": names}, {"a": entry(group=group_of(found))}) == []

    def test_with_another_seed_where_a_split_would_be_empty(self) -> None:
        names = [f"p{n // 2:02}_{n % 2}" for n in range(21)]
        (found,) = torn({"a": names}, {"a": entry()})
        assert "to `split`, with `seed: " in found.fix
        seed = int(found.fix.split("`seed: ")[1].split("`")[0])
        split = entry(group=group_of(found), seed=seed).split
        assert set(split.assign(names).values()) == {"train", "validation", "test"}

    def test_lists_are_mended_by_hand(self) -> None:
        lists = {"train": ["p0_0", "p1_0", "p1_1"], "validation": ["p0_1"], "test": []}
        (found,) = torn({"a": ["p0_0", "p0_1", "p1_0", "p1_1"]}, {"a": entry(**lists)})
        assert "a/p0_0 (train) and a/p0_1 (validation)." in found.what
        assert found.fix.endswith("to `split`, and move each patient's cases into one list.")

    def test_in_two_datasets(self) -> None:
        visit = {d: [f"p{n:02}_{v}" for n in range(20)] for v, d in enumerate("ab")}
        (found,) = torn(visit, {"a": entry(), "b": entry()})
        assert (found.where, found.dataset) == ("a, b", None)
        assert found.fix == (
            "If they are, add `group: '(.+)_'` to `split` of both, and give both the same `seed` "
            "and fractions."
        )
        mended = entry(group=group_of(found))
        assert torn(visit, {"a": mended, "b": mended}) == []
        same = {d: [f"1.2.840.{n}.{n * 7919}" for n in range(100, 120)] for d in "ab"}
        assert torn(same, {"a": entry(), "b": entry()}) == []
        (found,) = torn(same, {"a": entry(), "b": entry(seed=5)})
        assert group_of(found) == ".+"


class TestOrgans:
    def test_empty_in_all_is_one_error(self) -> None:
        (found,) = missing_organ("a", "liver", (3,), livers(0, 0, 0))
        assert (found.severity, found.where) == ("error", "a")
        assert "Is [3] really" in found.fix

    def test_empty_in_some_is_a_warning_each(self) -> None:
        found = missing_organ("a", "liver", (3,), livers(10, 0, 20, 0))
        assert [(f.severity, f.where) for f in found] == [("warning", "a/1"), ("warning", "a/3")]
        assert missing_organ("a", "liver", (3,), []) == []


class TestVolumes:
    usual = (1400.0, 1500.0, 1450.0, 1600.0, 1300.0, 1550.0, 1380.0)

    def test_far_from_the_others_is_odd(self) -> None:
        found = odd_volumes("liver", livers(*self.usual, 150))
        assert [f.where for f in found] == ["a/7"]
        assert "150 ml; 7 other cases of a have 1450 ml at the median" in found[0].what
        assert odd_volumes("liver", livers(*self.usual, 1800)) == []

    def test_a_wide_spread_is_no_reason(self) -> None:
        wide = (100.0, 200, 400, 800, 1600, 3200, 6400)
        assert not is_outlier(12_000, wide)
        assert is_outlier(12_000, self.usual)
        # A tiny spread alone is none either: at least twice, or half.
        assert not is_outlier(1700, [1000.0] * 9)
        assert is_outlier(2100, [1000.0] * 9)

    def test_few_cases_are_held_against_all_datasets(self) -> None:
        facts = [*livers(*self.usual), *livers(90, dataset="b")]
        (found,) = odd_volumes("liver", facts)
        assert found.where == "b/0"
        assert "other cases of all datasets" in found.what
        assert odd_volumes("liver", livers(1500, 90, 1400)) == []  # too few to say


class TestPlaces:
    def facts(self, *x: float, air: float = 0.0) -> list[CaseFacts]:
        return [
            case(f"a/{n}", organ_place={"liver": (0, 0, v)}, organ_air={"liver": air})
            for n, v in enumerate(x)
        ]

    def test_on_the_other_side_is_odd(self) -> None:
        (found,) = misplaced("liver", self.facts(0.4, 0.5, 0.45, 0.38, 0.41, -0.42))
        assert found.where == "a/5"
        assert "lies left of the body's middle, and right of it in most of 6 cases" in found.what

    def test_an_organ_of_the_middle_has_no_side(self) -> None:
        assert misplaced("liver", self.facts(0.1, -0.2, 0.1, 0.12, -0.3, 0.1)) == []
        assert misplaced("liver", self.facts(0.4, -0.4)) == []

    def test_labels_in_air(self) -> None:
        facts = [*self.facts(0, 0, 0, 0, 0), case("b/0", organ_air={"liver": 0.5})]
        (found,) = in_air("liver", facts)
        assert found.where == "b/0"
        assert "50% of the label" in found.what
        assert in_air("liver", self.facts(0, 0, 0, 0, 0, 0, air=0.9)) == []  # lungs are
