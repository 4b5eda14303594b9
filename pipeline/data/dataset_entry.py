"""What a registry says about the student grid and about one dataset. Data only: no file is read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.config import Config
from pipeline.data.files import FoundPair, Pair, find_pairs
from pipeline.data.phantom_spec import PhantomSpec
from pipeline.teacher_entry import OneOrMore

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")

_BESIDE_CASE = re.compile(r"\*\{case\}|\{case\}\*")
_DOUBLE_STAR_IN_NAME = re.compile(r"[^/]\*\*|\*\*[^/]")


def _fraction_or_cases(value: Any) -> str:
    return "cases" if isinstance(value, (list, tuple)) else "fraction"


# Told apart by the value, so that a mistake in one is not reported as a mistake in both.
FractionOrCases = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("fraction")] | Annotated[tuple[str, ...], Tag("cases")],
    Discriminator(_fraction_or_cases),
]


class GridEntry(Config):
    """The student grid: one spacing for all; each case keeps its own field of view."""

    spacing_mm: tuple[float, float, float] = Field(description="z, y, x")
    orientation: Literal["RAS"] = Field(default="RAS", description="fixed")

    @model_validator(mode="after")
    def _positive(self) -> GridEntry:
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm {self.spacing_mm} must be positive")
        return self


class SplitEntry(Config):
    """By fraction: `validation` and `test` are fractions, the rest trains, `seed` draws.

    By list: `train`, `validation` and `test` name their cases; a case in none is left out.
    """

    train: tuple[str, ...] | None = Field(
        default=None, description="cases; left out: what the fractions leave"
    )
    validation: FractionOrCases = Field(default=0.2, description="fraction, or cases")
    test: FractionOrCases = Field(default=0.0, description="fraction, or cases")
    seed: int = Field(default=0, description="of the draw by fractions")

    @model_validator(mode="after")
    def _one_way(self) -> SplitEntry:
        lists = [isinstance(part, tuple) for part in (self.validation, self.test)]
        if self.train is None and any(lists):
            raise ValueError("a split by list names `train` too, or use fractions throughout")
        if self.train is not None and not all(lists):
            raise ValueError("with `train` as a list, `validation` and `test` are lists too")
        if self.train is None and float(self.validation) + float(self.test) > 1:  # type: ignore[arg-type]
            raise ValueError("validation and test together are more than 1")
        return self

    def assign(self, cases: list[str]) -> dict[str, SplitName]:
        """Case -> split; a pure function of the names and this entry."""
        if self.train is not None:
            parts = zip(SPLITS, (self.train, self.validation, self.test), strict=True)
            return {case: split for split, part in parts for case in part}  # type: ignore[union-attr]
        drawn = sorted(cases, key=lambda c: hashlib.sha256(f"{self.seed}:{c}".encode()).digest())
        num_validation = _share(float(self.validation), len(cases))  # type: ignore[arg-type]
        num_test = min(_share(float(self.test), len(cases)), len(cases) - num_validation)  # type: ignore[arg-type]
        splits: dict[str, SplitName] = dict.fromkeys(cases, "train")
        splits.update(dict.fromkeys(drawn[:num_validation], "validation"))
        splits.update(dict.fromkeys(drawn[num_validation : num_validation + num_test], "test"))
        return splits


class FilesEntry(Config):
    """The part of a dataset's entry that says which files are its cases."""

    root: str = Field(min_length=1, description="folder, relative to the registry's folder")
    images: str | None = Field(default=None, description="pattern with {case}, below root")
    labels: str | None = Field(default=None, description="pattern with {case}, below root")
    pairs: dict[Name, Pair] | None = Field(default=None, description="instead of patterns")
    phantom: PhantomSpec | None = Field(
        default=None, description="if given, `pipeline phantom` generates the files"
    )

    @model_validator(mode="after")
    def _files_named_once(self) -> FilesEntry:
        if (self.pairs is None) == (self.images is None):
            raise ValueError("name the files by `images` and `labels`, or by `pairs`")
        if (self.images is None) != (self.labels is None):
            raise ValueError("`images` and `labels` belong together")
        for pattern in (self.images, self.labels):
            if pattern is not None:
                _check_pattern(pattern)
        return self

    def find(self, base: Path) -> tuple[dict[str, FoundPair], list[str]]:
        """The cases, and what is wrong with them; `base` is the registry's folder."""
        root = base / Path(self.root).expanduser()
        return find_pairs(root, self.images, self.labels, self.pairs, self.phantom)


class DatasetEntry(FilesEntry):
    """One folder of CTs and the organs that somebody annotated in all of them."""

    annotated: dict[str, OneOrMore] = Field(
        min_length=1, description="organ -> label value, or list of values, that mean it"
    )
    ignore_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="label values that mean unknown; such voxels teach nothing"
    )
    background_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="label values of structures that are none of the organs"
    )
    # Left out of dumps at its default: datasets of before it existed keep their keys.
    units: Literal["hu", "other"] = Field(
        default="hu",
        description="of the images; other: they are no Hounsfield units, on purpose",
        exclude_if=lambda value: value == "hu",
    )
    split: SplitEntry = Field(default_factory=SplitEntry)
    licence: str = Field(default="", description="for people; never part of a digest")
    source: str = Field(default="", description="for people; never part of a digest")


def _check_pattern(pattern: str) -> None:
    if pattern.count("{case}") != 1:
        raise ValueError(f"pattern {pattern!r} must contain {{case}} exactly once")
    if Path(pattern).is_absolute():
        raise ValueError(f"pattern {pattern!r} must be relative to `root`")
    if _DOUBLE_STAR_IN_NAME.search(pattern):
        raise ValueError(f"in pattern {pattern!r} ** must stand between slashes, as in a/**/b")
    if _BESIDE_CASE.search(pattern):
        raise ValueError(
            f"pattern {pattern!r} does not say where the case's name begins and ends: "
            "put some other character between * and {case}"
        )


def _share(fraction: float, total: int) -> int:
    """At least one case for any positive fraction, if there is more than one."""
    return max(round(fraction * total), 1 if fraction > 0 and total > 1 else 0)
