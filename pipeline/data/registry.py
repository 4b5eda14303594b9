"""`data_registry.yaml`: what exists. Organs, student grid, datasets, teachers.

Reading it reports every mistake at once, each with its line and the way out. Nothing it names is
executed by reading it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from pipeline.config import (
    Config,
    Document,
    Problem,
    digest,
    raise_problems,
    read_yaml,
    schema_problems,
)
from pipeline.data.files import CaseFiles, Pair, find_pairs
from pipeline.data.phantom import PhantomSpec
from pipeline.errors import RegistryError
from pipeline.labels import IGNORE, MAX_ORGAN_ID, LabelSpace
from pipeline.teacher_entry import OneOrMore, TeacherEntry

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


class GridEntry(Config):
    """The student grid: one spacing for all; each case keeps its own field of view."""

    spacing_mm: tuple[float, float, float] = Field(description="z, y, x")
    orientation: Literal["RAS"] = "RAS"

    @model_validator(mode="after")
    def _positive(self) -> GridEntry:
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm {self.spacing_mm} must be positive")
        return self


class SplitEntry(Config):
    """By fraction: `validation` and `test` are fractions, the rest trains, `seed` draws.

    By list: `train`, `validation` and `test` name their cases; a case in none is left out.
    """

    train: tuple[str, ...] | None = None
    validation: Annotated[float, Field(ge=0, le=1)] | tuple[str, ...] = 0.2
    test: Annotated[float, Field(ge=0, le=1)] | tuple[str, ...] = 0.0
    seed: int = 0

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

    def named(self) -> list[str]:
        """All cases that a split by list names, in order, with repetitions."""
        if self.train is None:
            return []
        assert isinstance(self.validation, tuple)
        assert isinstance(self.test, tuple)
        return [*self.train, *self.validation, *self.test]

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


class DatasetEntry(Config):
    """One folder of CTs and the organs that somebody annotated in all of them."""

    root: str = Field(min_length=1, description="folder, relative to the registry's folder")
    images: str | None = Field(default=None, description="pattern with {case}, below root")
    labels: str | None = Field(default=None, description="pattern with {case}, below root")
    pairs: dict[Name, Pair] | None = Field(default=None, description="instead of patterns")
    annotated: dict[str, OneOrMore] = Field(
        min_length=1, description="organ -> label value, or list of values, that mean it"
    )
    ignore_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="label values that mean unknown; such voxels teach nothing"
    )
    background_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="label values of structures that are none of the organs"
    )
    split: SplitEntry = Field(default_factory=SplitEntry)
    phantom: PhantomSpec | None = Field(
        default=None, description="if given, `pipeline phantom` generates the files"
    )
    licence: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _files_named_once(self) -> DatasetEntry:
        if (self.pairs is None) == (self.images is None):
            raise ValueError("name the files by `images` and `labels`, or by `pairs`")
        if (self.images is None) != (self.labels is None):
            raise ValueError("`images` and `labels` belong together")
        for pattern in (self.images, self.labels):
            if pattern is not None and pattern.count("{case}") != 1:
                raise ValueError(f"pattern {pattern!r} must contain {{case}} exactly once")
        return self


class Registry(Config):
    """The whole registry; paths in it are relative to the file's folder."""

    schema_version: Literal[1]
    organs: dict[Name, Annotated[int, Field(ge=1, le=MAX_ORGAN_ID)]] = Field(min_length=1)
    grid: GridEntry
    datasets: dict[Name, DatasetEntry] = Field(min_length=1)
    teachers: dict[Name, TeacherEntry] = Field(default_factory=dict)
    _path: Path = PrivateAttr(default=Path("data_registry.yaml"))

    @property
    def path(self) -> Path:
        """The file this was read from."""
        return self._path

    @property
    def label_space(self) -> LabelSpace:
        """Organs with their ids, in the order of the student's channels."""
        return LabelSpace(self.organs)

    def resolve(self, path: str) -> Path:
        """A path as written in the registry -> a path that can be opened."""
        return self._path.parent / Path(path).expanduser()

    def cases(self, dataset: str) -> list[CaseFiles]:
        """The cases of a dataset with files and split, by name; cases in no split are left out.

        A phantom's cases follow from its spec, whether it has been generated yet or not.
        """
        pairs, _ = self._pairs(dataset)
        splits = self.datasets[dataset].split.assign(sorted(pairs))
        return [
            CaseFiles(dataset, case, pair.image_path, pair.label_path, splits[case])
            for case, pair in sorted(pairs.items())
            if case in splits
        ]

    def dataset_key(self, dataset: str) -> str:
        """Digest of what this registry says of a dataset and the grid; no file is read."""
        entry = self.datasets[dataset].model_dump(mode="json", exclude={"licence", "source"})
        ids = {organ: self.organs[organ] for organ in self.datasets[dataset].annotated}
        return digest({"dataset": entry, "ids": ids, "grid": self.grid})

    def teacher_key(self, teacher: str) -> str:
        """Digest of what this registry says of a teacher and the grid; no file is read."""
        entry = self.teachers[teacher].model_dump(mode="json", exclude={"licence", "source"})
        return digest({"teacher": entry, "grid": self.grid})

    def experts(self) -> Mapping[str, tuple[str, ...]]:
        """Organ -> the teachers that are expert in it, by name."""
        return {
            organ: tuple(sorted(t for t, e in self.teachers.items() if organ in e.organs))
            for organ in self.label_space.organs
        }

    def _pairs(self, dataset: str) -> tuple[dict[str, Any], list[str]]:
        entry = self.datasets[dataset]
        root = self.resolve(entry.root)
        return find_pairs(root, entry.images, entry.labels, entry.pairs, entry.phantom)


def load_registry(path: Path, *, files: bool = True) -> Registry:
    """Reads and checks a registry.

    Args:
        path: the YAML file.
        files: also check that patterns match, every image has its label, and no case is named
            twice. Stage two passes False: it runs where the raw CTs are not.

    Raises:
        RegistryError: lists every mistake with file, line and remedy.
    """
    document = read_yaml(path, error=RegistryError)
    problems = list(document.problems)
    registry: Registry | None = None
    try:
        registry = Registry.model_validate(document.data)
    except ValidationError as failure:
        problems += schema_problems(failure, Registry)
    problems += _cross_check(document)
    if registry is not None:
        registry._path = path
        if files:
            for name in registry.datasets:
                problems += _check_files(registry, name)
    raise_problems(document, problems, error=RegistryError)
    assert registry is not None
    return registry


def _cross_check(document: Document) -> list[Problem]:
    """What no single field can know. Works on the raw data, so that it also runs, for what can be
    read, when other parts of the file are wrong: all mistakes are told in one run."""
    data = document.data if isinstance(document.data, dict) else {}
    organs, datasets, teachers = (
        _mapping(data.get(key)) for key in ("organs", "datasets", "teachers")
    )
    problems = _check_ids(organs)
    known: set[str] = set()
    for name, entry in datasets.items():
        annotated = _mapping(_mapping(entry).get("annotated"))
        known |= set(annotated)
        problems += _check_values(name, _mapping(entry), annotated)
        problems += _unknown_organs(("datasets", name, "annotated"), annotated, organs)
    for name, entry in teachers.items():
        expert = _mapping(_mapping(entry).get("organs"))
        known |= set(expert)
        problems += _check_teacher(name, _mapping(entry), expert, datasets)
        problems += _unknown_organs(("teachers", name, "organs"), expert, organs)
    for organ in organs:
        if organ not in known:
            fix = "Remove it, or add a dataset or teacher for it."
            what = f"no dataset annotates {organ} and no teacher knows it."
            problems.append(Problem(("organs", organ), what, fix))
    return problems


def _check_ids(organs: Mapping[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    owner: dict[str, str] = {}
    for organ, organ_id in organs.items():
        first = owner.setdefault(str(organ_id), organ)
        if first != organ:
            what = f"id {organ_id} is already used by {first}."
            problems.append(Problem(("organs", organ), what, "Give every organ its own id."))
    return problems


def _check_values(
    name: str, entry: Mapping[str, Any], annotated: Mapping[str, Any]
) -> list[Problem]:
    problems: list[Problem] = []
    owner: dict[str, str] = {}
    others = {key: entry.get(key) or [] for key in ("ignore_values", "background_values")}
    meanings = {**annotated, **others}
    for organ, values in meanings.items():
        where = ("annotated", organ) if organ in annotated else (organ,)
        for value in values if isinstance(values, list) else [values]:
            first = owner.setdefault(str(value), organ)
            if first != organ:
                what = f"label value {value} already means {first}."
                fix = "A label value has one meaning."
                problems.append(Problem(("datasets", name, *where), what, fix))
            if str(value) == "0":
                what, fix = "label value 0 is background.", "Use the organ's own value."
                problems.append(Problem(("datasets", name, *where), what, fix))
    return problems


def _check_teacher(
    name: str, entry: Mapping[str, Any], expert: Mapping[str, Any], datasets: Mapping[str, Any]
) -> list[Problem]:
    problems = []
    num_channels = entry.get("num_channels")
    for organ, channels in expert.items():
        for channel in channels if isinstance(channels, list) else [channels]:
            if not isinstance(num_channels, int) or not isinstance(channel, int):
                continue
            if channel >= num_channels:
                what = f"channel {channel} is out of range: num_channels is {num_channels}."
                fix = f"Channels count from 0 to {num_channels - 1}."
                problems.append(Problem(("teachers", name, "organs", organ), what, fix))
    trained_on = entry.get("trained_on")
    if trained_on is not None and trained_on not in datasets:
        fix = f"Datasets are: {', '.join(map(str, datasets))}."
        what = f"there is no dataset {trained_on!r}."
        problems.append(Problem(("teachers", name, "trained_on"), what, fix))
    elif trained_on is not None:
        annotated = _mapping(_mapping(datasets[trained_on]).get("annotated"))
        for organ in expert:
            if organ not in annotated:
                what = f"{trained_on} does not annotate {organ}, so it cannot teach it."
                fix = "Choose the dataset that does."
                problems.append(Problem(("teachers", name, "trained_on"), what, fix))
    return problems


def _unknown_organs(
    where: tuple[str, ...], named: Mapping[str, Any], organs: Mapping[str, Any]
) -> list[Problem]:
    fix = f"Add it to `organs`, or correct its name; organs are: {', '.join(map(str, organs))}."
    return [
        Problem((*where, organ), f"{organ} is not one of the registry's organs.", fix)
        for organ in named
        if organ not in organs
    ]


def _check_files(registry: Registry, name: str) -> list[Problem]:
    pairs, findings = registry._pairs(name)
    here = ("datasets", name)
    problems = [Problem(here, finding) for finding in findings]
    entry = registry.datasets[name]
    named = entry.split.named()
    for case in sorted({c for c in named if named.count(c) > 1}):
        fix = "A case belongs to one split."
        problems.append(Problem((*here, "split"), f"case {case} is named twice.", fix))
    if pairs:
        for case in sorted(set(named) - set(pairs)):
            fix = "Correct the name, or remove it."
            problems.append(Problem((*here, "split"), f"there is no case {case}.", fix))
    return problems


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _share(fraction: float, total: int) -> int:
    """At least one case for any positive fraction, if there is more than one."""
    return max(round(fraction * total), 1 if fraction > 0 and total > 1 else 0)


__all__ = [
    "IGNORE",
    "SPLITS",
    "CaseFiles",
    "DatasetEntry",
    "Registry",
    "SplitName",
    "load_registry",
]
