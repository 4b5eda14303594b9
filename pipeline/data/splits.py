"""Which case trains, validates or tests: by the hash of its name or patient, or by lists."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError, model_validator

from pipeline.config import Config, Document, Problem
from pipeline.errors import RegistryError, listed

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
Place = SplitName | int  # a number is a fold's
_SEEDS: Final = 100  # that are tried for a split in which no part is empty
_CLOSE: Final = 0.02
_SHOWN: Final = 5


# Told apart by the value, so that a mistake in one is not reported as a mistake in both.
FractionOrCases = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("fraction")] | Annotated[tuple[str, ...], Tag("cases")],
    Discriminator(lambda value: "cases" if isinstance(value, (list, tuple)) else "fraction"),
]

Folds = Annotated[
    Annotated[int, Field(ge=2), Tag("number")]
    | Annotated[
        tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...],
        Field(min_length=2), Tag("lists"),
    ],
    Discriminator(lambda value: "lists" if isinstance(value, (list, tuple)) else "number"),
]  # fmt: skip


class PatientColumn(Config):
    """A table that says which cases are of one patient; it is read with the registry."""

    csv: str = Field(min_length=1, description="file, relative to the registry's folder")
    case: str = Field(min_length=1, description="column of the cases' names")
    column: str = Field(min_length=1, description="column of the patients")

    def read(self, base: Path) -> dict[str, str]:
        """Case -> patient; `base` is the registry's folder.

        Raises:
            RegistryError: no such file or column, a row without a patient, a case of two patients.
        """
        path = base / Path(self.csv).expanduser()
        found: dict[str, str] = {}
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file)
                for name in (self.case, self.column):
                    if name not in (rows.fieldnames or ()):
                        columns = ", ".join(rows.fieldnames or ()) or "none"
                        raise RegistryError(
                            f"there is no column {name!r}.",
                            where=path,
                            fix=f"Columns, divided by commas: {columns}.",
                        )
                for row in rows:
                    case, patient = ((row[n] or "").strip() for n in (self.case, self.column))
                    if not patient or found.setdefault(case, patient) != patient:
                        what = f"has two patients, {found[case]} and {patient}" if patient else ""
                        raise RegistryError(
                            f"case {case!r} {what or 'has no patient'}.",
                            where=f"{path}:{rows.line_num}",
                            fix="Give every case one patient.",
                        )
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise RegistryError(
                f"cannot be read ({error}).", where=path, fix="Correct the path, or the file."
            ) from error
        return found


def _compiles(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return text


RegexOrTable = Annotated[
    Annotated[str, Field(min_length=1), AfterValidator(_compiles), Tag("regex")]
    | Annotated[PatientColumn, Tag("table")],
    Discriminator(lambda value: "regex" if isinstance(value, str) else "table"),
]


class SplitEntry(Config):
    """By fraction: a hash of `seed` and of the case's name, or of its patient's, is a number from
    0 to 1. Below `test` the case tests, below `test` + `validation` it validates, else it trains:
    whatever other cases there are.

    By list: `train`, `validation` and `test` name their cases; a case in none is left out.

    In folds: each in turn validates while the others train, and test cases test. A number deals the
    patients (without `group`, the cases) in the order of their hashes; lists name the cases.
    """

    train: tuple[str, ...] | None = Field(
        default=None, description="cases; left out: what the fractions leave"
    )
    validation: FractionOrCases = Field(default=0.2, description="fraction, or cases")
    test: FractionOrCases = Field(default=0.0, description="fraction, or cases")
    seed: int = Field(default=0, description="of the hash, for fractions")
    folds: Folds | None = Field(
        default=None,
        description="instead of train and validation: how many, or the cases of each",
        exclude_if=lambda value: value is None,  # out of digests: datasets of before it stay
    )
    group: RegexOrTable | None = Field(
        default=None, description="a case's patient, who is in one split: regex, or CSV's column"
    )

    @model_validator(mode="after")
    def _one_way(self) -> SplitEntry:
        if self.folds is not None:
            if given := sorted({"train", "validation"} & self.model_fields_set):
                raise ValueError(f"each fold validates once: leave out {' and '.join(given)}")
            if isinstance(self.folds, tuple) and self.test and not isinstance(self.test, tuple):
                raise ValueError("with `folds` as lists, `test` is a list too")
            return self
        lists = [isinstance(part, tuple) for part in (self.validation, self.test)]
        if self.train is None and any(lists):
            raise ValueError("a split by list names `train` too, or use fractions throughout")
        if self.train is not None and not all(lists):
            raise ValueError("with `train` as a list, `validation` and `test` are lists too")
        if self.train is None and self.fractions["train"] < 0:
            raise ValueError("validation and test together are more than 1")
        return self

    @property
    def num_folds(self) -> int:
        """0: the cases are not in folds."""
        return len(self.folds) if isinstance(self.folds, tuple) else self.folds or 0

    @property
    def by_list(self) -> bool:
        """Whether a case that no list names is left out."""
        return self.train is not None or isinstance(self.folds, tuple)

    @property
    def lists(self) -> dict[str, Place]:
        """Case -> place, of those that lists name."""
        folds = self.folds if isinstance(self.folds, tuple) else ()
        parts = zip(SPLITS, (self.train, self.validation, self.test), strict=True)
        named: list[tuple[Place, Any]] = [*parts, *enumerate(folds)]
        return {c: place for place, part in named if isinstance(part, tuple) for c in part}

    @property
    def fractions(self) -> dict[SplitName, float]:
        """What each split is to have of the cases; nothing for a split by list."""
        if isinstance(self.validation, tuple) or isinstance(self.test, tuple):
            return {}
        if self.folds is not None:
            return {"test": self.test}
        train = round(1 - self.validation - self.test, 9)
        return {"train": train, "validation": self.validation, "test": self.test}

    def patients(
        self, cases: Iterable[str], table: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Case -> patient, by `group`, or by what the table that it names gave; a case that it says
        nothing of is absent."""
        if isinstance(self.group, PatientColumn):
            return {case: table[case] for case in cases if case in table} if table else {}
        found = {}
        for case in cases if self.group is not None else ():
            match = re.match(self.group or "", case)
            if match and (key := match[1 if match.re.groups else 0]):
                found[case] = key
        return found

    def assign(
        self, cases: Iterable[str], table: Mapping[str, str] | None = None, dataset: str = ""
    ) -> dict[str, Place]:
        """Case -> split, or fold: of its name, or its patient, and this entry alone; in folds of a
        number, of the other cases' too, and of the dataset's name. See `patients`.

        Raises:
            RegistryError: `group` does not say whose a case is.
        """
        cases = list(cases)
        if self.by_list:
            return self.lists
        keys = dict(zip(cases, cases, strict=True))
        if self.group is not None:
            keys = self.patients(cases, table)
            check_patients(self, cases, keys)
        test = self.fractions.get("test", 0.0)
        held_out = test + self.fractions.get("validation", 0.0)
        places = {case: hash_to_unit(self.seed, key) for case, key in keys.items()}
        drawn: dict[str, Place] = {
            case: "test" if place < test else "validation" if place < held_out else "train"
            for case, place in places.items()
        }
        drawn |= self.lists
        if not self.num_folds:
            return drawn
        left = sorted({(places[c], keys[c]) for c, place in drawn.items() if place == "train"})
        # What is left over goes to other folds in each dataset, unless patients may be in several.
        first = 0 if self.group else int(hash_to_unit(self.seed, dataset) * self.num_folds)
        fold_of = {key: n % self.num_folds for n, (_, key) in enumerate(left, first)}
        return {c: fold_of[keys[c]] if drawn[c] == "train" else drawn[c] for c in cases}

    def empty(self, drawn: Collection[object], among: Collection[str] = SPLITS) -> list[SplitName]:
        """Those of some splits that are to have a part of the cases, and got none."""
        return [s for s, part in self.fractions.items() if part and s in among and s not in drawn]

    def digested(self, table: Mapping[str, str] | None = None) -> dict[str, Any]:
        """All that says which case is in which split, for digests. Lists are what they always were;
        fractions have meant other cases before there were thresholds. Where a table lies is not in
        it."""
        by_regex = isinstance(self.group, str)
        told = self.model_dump(mode="json", exclude=None if by_regex else {"group"})
        if not self.by_list:
            told["drawn_by"] = "threshold"
        return told | ({"patients": dict(table)} if table is not None else {})


def role(place: Place, fold: int | None) -> SplitName:
    """What a case does while a fold validates; None is the first one, as for all that is done once
    for all folds: the gate, what teachers are relied on for, teachers' own training."""
    if isinstance(place, str):
        return place
    return "validation" if place == (fold or 0) else "train"


def in_words(place: Place) -> str:
    """`train`, or `fold 2`."""
    return place if isinstance(place, str) else f"fold {place}"


def hash_to_unit(seed: int, key: str) -> float:
    """A number from 0 to below 1 that depends on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6]) / 2**48


def check_patients(split: SplitEntry, cases: Iterable[str], patients: Mapping[str, str]) -> None:
    """That each case has a patient.

    Raises:
        RegistryError: some have none.
    """
    without = [case for case in cases if case not in patients]
    if not without:
        return
    names = listed(without, _SHOWN)
    if isinstance(split.group, PatientColumn):
        raise RegistryError(
            f"`group` does not say whose these cases are: {names}.",
            where="split.group",
            fix=f"Add a row for each to {split.group.csv}.",
        )
    raise RegistryError(
        f"`group` {split.group!r} finds no patient at the beginning of these names: {names}.",
        where="split.group",
        fix="Correct the regular expression: its first (..), or all of it, is the patient.",
    )


def fitting_seed(split: SplitEntry, datasets: Iterable[Collection[str]]) -> int | None:
    """The first of 100 seeds by which no wanted split of any dataset is empty and each is within
    2 % of the cases of its fraction, or else comes closest; None if all leave one empty.

    Args:
        datasets: the cases, or patients, of each; all are drawn by one seed, so that a name in two
            of them is in one split. Those with fewer cases than splits cannot be helped.
    """
    wanted = sum(part > 0 for part in split.fractions.values())
    names = [list(cases) for cases in datasets if len(cases) >= wanted]
    best: tuple[float, int] | None = None
    for seed in range(_SEEDS if names else 0):
        other = split.model_copy(update={"seed": seed, "group": None})
        drawn = [other.assign(cases) for cases in names]
        if any(other.empty(assigned.values()) for assigned in drawn):
            continue
        off = max(
            abs(list(assigned.values()).count(name) - part * len(assigned)) / len(assigned)
            for assigned in drawn
            for name, part in other.fractions.items()
        )
        best = min(best or (off, seed), (off, seed))
        if off <= _CLOSE:
            break
    return None if best is None else best[1]


# What the splits of a registry's datasets contradict, on the raw data of the file.


def splits_of(document: Document) -> dict[str, SplitEntry]:
    """Dataset -> its split, where it can be read; what is wrong is reported with the schema."""
    found = {}
    for name, entry in as_mapping(as_mapping(document.data).get("datasets")).items():
        with suppress(ValidationError):
            found[name] = SplitEntry.model_validate(as_mapping(entry).get("split") or {})
    return found


def read_tables(document: Document) -> tuple[dict[str, dict[str, str]], list[Problem]]:
    """Dataset -> case -> patient, by the CSVs that `split.group` names, and what is wrong there."""
    tables: dict[str, dict[str, str]] = {}
    problems = []
    for name, split in splits_of(document).items():
        if isinstance(split.group, PatientColumn):
            try:
                tables[name] = split.group.read(document.path.parent)
            except RegistryError as error:
                here = ("datasets", name, "split", "group")
                problems.append(Problem(here, f"{error.where}: {error.what}", error.fix))
    return tables, problems


def check_splits(document: Document) -> list[Problem]:
    """Cases in two lists, tables that cannot be read, and folds beside other numbers of folds, or
    beside validation cases: each case is to be scored once, by the student that did not see it."""
    problems = read_tables(document)[1]
    splits = splits_of(document)
    wanted = max((split.num_folds for split in splits.values()), default=0)
    for name, entry in as_mapping(as_mapping(document.data).get("datasets")).items():
        owner: dict[str, str] = {}
        here = ("datasets", name, "split")
        for split, where, case in split_cases(as_mapping(entry)):
            if case in owner:
                what = f"case {case} is already in {owner[case]}."
                fix = "A case belongs to one split, once."
                problems.append(Problem((*here, *where), what, fix))
            owner.setdefault(case, split)
        number = splits[name].num_folds if name in splits else wanted
        if number != wanted and (number or splits[name].validation):
            has = f"{number} folds" if number else "validation cases and no folds"
            what = f"another dataset is in {wanted} folds, this one has {has}."
            fix = f"Write `folds: {wanted}`, or `validation: 0.0`: it trains in all folds then."
            problems.append(Problem(here, what, fix))
    return problems


def check_groups(document: Document, found: Mapping[str, list[str]]) -> list[Problem]:
    """Cases of no patient, patients who are in two splits or folds, of a dataset or of several, and
    more folds than patients."""
    problems = []
    tables, unread = read_tables(document)
    first: dict[str, tuple[str, str, Place]] = {}
    for name, split in splits_of(document).items():
        here = ("datasets", name, "split", "group")
        if any(problem.location == here for problem in unread):
            continue
        listed = split.lists
        cases = [case for case in found.get(name, []) if not split.by_list or case in listed]
        patients = split.patients(cases, tables.get(name))
        try:
            drawn = split.assign(cases, tables.get(name), name)
            check_patients(split, cases if split.group else (), patients)
        except RegistryError as error:
            problems.append(Problem(here, error.what, error.fix))
            continue
        num_folds = len({place for place in drawn.values() if isinstance(place, int)})
        if cases and num_folds < split.num_folds:
            what = f"{split.num_folds} folds are more than it has patients to deal ({num_folds})."
            fix = "Ask for fewer; or let its cases train in all folds: `split: {validation: 0.0}`."
            problems.append(Problem((*here[:-1], "folds"), what, fix))
        torn = []
        for case, patient in patients.items():
            other = first.setdefault(patient, (name, case, drawn[case]))
            if other[2] != drawn[case]:
                torn.append((patient, case, other))
        if torn:
            patient, case, (dataset, twin, where) = torn[0]
            what = (
                f"patient {patient} is in two splits: {case} in {in_words(drawn[case])}, "
                f"{twin} of {dataset} in {in_words(where)}"
            )
            what += f" (and {len(torn) - 1} more)." if len(torn) > 1 else "."
            fix = "A patient belongs to one split, in all datasets: with fractions, give all the "
            fix += "same `seed` and fractions; in lists, move the case."
            if isinstance(where, int) or isinstance(drawn[case], int):
                fix = "A patient belongs to one fold, in all datasets: name the folds by lists."
            problems.append(Problem(here, what, fix))
    return problems


def split_cases(entry: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str | int, ...], str]]:
    """(split or fold, place in `split`, case) of every case that lists name."""
    parts = as_mapping(entry.get("split"))
    folds = parts["folds"] if isinstance(parts.get("folds"), list) else []
    named: list[tuple[str, tuple[str | int, ...], Any]] = [
        *((split, (split,), parts.get(split)) for split in SPLITS),
        *((in_words(k), ("folds", k), cases) for k, cases in enumerate(folds)),
    ]
    for split, where, cases in named:
        for index, case in enumerate(cases if isinstance(cases, list) else []):
            if isinstance(case, str):
                yield split, (*where, index), case


def as_mapping(value: Any) -> Mapping[str, Any]:
    """What was read of a file, where a mapping is meant; else an empty one."""
    return value if isinstance(value, dict) else {}
