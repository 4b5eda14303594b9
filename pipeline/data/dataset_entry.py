"""What a registry says about the student grid and about one dataset. Data only: no file is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Config
from pipeline.data.files import FoundPair, Pair, find_pairs
from pipeline.data.phantom_spec import PhantomSpec
from pipeline.data.split_entry import SplitEntry
from pipeline.teacher_entry import OneOrMore

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]

_BESIDE_CASE = re.compile(r"\*\{case\}|\{case\}\*")
_DOUBLE_STAR_IN_NAME = re.compile(r"[^/]\*\*|\*\*[^/]")


class GridEntry(Config):
    """The student grid: one spacing for all; each case keeps its own field of view."""

    spacing_mm: tuple[float, float, float] = Field(description="z, y, x")
    orientation: Literal["RAS"] = Field(default="RAS", description="fixed")

    @model_validator(mode="after")
    def _positive(self) -> GridEntry:
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm {self.spacing_mm} must be positive")
        return self


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
