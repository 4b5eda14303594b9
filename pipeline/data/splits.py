"""Which case trains, validates or tests: by the hash of its name or patient, or by lists."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from pipeline.config import Config
from pipeline.errors import RegistryError, listed

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_SEEDS: Final = 100  # that are tried for a split in which no part is empty
_CLOSE: Final = 0.02
_SHOWN: Final = 5


def _fraction_or_cases(value: Any) -> str:
    return "cases" if isinstance(value, (list, tuple)) else "fraction"


# Told apart by the value, so that a mistake in one is not reported as a mistake in both.
FractionOrCases = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("fraction")] | Annotated[tuple[str, ...], Tag("cases")],
    Discriminator(_fraction_or_cases),
]


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


def _regex_or_table(value: Any) -> str:
    return "regex" if isinstance(value, str) else "table"


def _compiles(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return text


RegexOrTable = Annotated[
    Annotated[str, Field(min_length=1), AfterValidator(_compiles), Tag("regex")]
    | Annotated[PatientColumn, Tag("table")],
    Discriminator(_regex_or_table),
]


class SplitEntry(Config):
    """By fraction: a hash of `seed` and of the case's name, or of its patient's, is a number from
    0 to 1. Below `test` the case tests, below `test` + `validation` it validates, else it trains:
    whatever other cases there are.

    By list: `train`, `validation` and `test` name their cases; a case in none is left out.
    """

    train: tuple[str, ...] | None = Field(
        default=None, description="cases; left out: what the fractions leave"
    )
    validation: FractionOrCases = Field(default=0.2, description="fraction, or cases")
    test: FractionOrCases = Field(default=0.0, description="fraction, or cases")
    seed: int = Field(default=0, description="of the hash, for fractions")
    group: RegexOrTable | None = Field(
        default=None, description="a case's patient, who is in one split: regex, or CSV's column"
    )

    @model_validator(mode="after")
    def _one_way(self) -> SplitEntry:
        lists = [isinstance(part, tuple) for part in (self.validation, self.test)]
        if self.train is None and any(lists):
            raise ValueError("a split by list names `train` too, or use fractions throughout")
        if self.train is not None and not all(lists):
            raise ValueError("with `train` as a list, `validation` and `test` are lists too")
        if self.train is None and self.fractions["train"] < 0:
            raise ValueError("validation and test together are more than 1")
        return self

    @property
    def lists(self) -> dict[str, SplitName]:
        """Case -> split, of a split by list; empty for one by fraction."""
        parts = zip(SPLITS, (self.train, self.validation, self.test), strict=True)
        return {c: split for split, part in parts if isinstance(part, tuple) for c in part}

    @property
    def fractions(self) -> dict[SplitName, float]:
        """What each split is to have of the cases; nothing for a split by list."""
        if isinstance(self.validation, tuple) or isinstance(self.test, tuple):
            return {}
        train = round(1 - self.validation - self.test, 9)
        return {"train": train, "validation": self.validation, "test": self.test}

    def patients(
        self, cases: Iterable[str], table: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Case -> patient, by `group`; a case that it says nothing of is absent.

        Args:
            cases: their names.
            table: what `PatientColumn.read` gave, if `group` is one.
        """
        if isinstance(self.group, PatientColumn):
            return {case: table[case] for case in cases if case in table} if table else {}
        found = {}
        for case in cases if self.group is not None else ():
            match = re.match(self.group or "", case)
            if match and (key := match[1 if match.re.groups else 0]):
                found[case] = key
        return found

    def assign(
        self, cases: Iterable[str], table: Mapping[str, str] | None = None
    ) -> dict[str, SplitName]:
        """Case -> split: of its name, or its patient, and this entry alone; see `patients`.

        Raises:
            RegistryError: `group` does not say whose a case is.
        """
        cases = list(cases)
        if self.train is not None:
            return self.lists
        keys = dict(zip(cases, cases, strict=True))
        if self.group is not None:
            keys = self.patients(cases, table)
            check_patients(self, cases, keys)
        test = self.fractions["test"]
        held_out = test + self.fractions["validation"]
        places = {case: hash_to_unit(self.seed, key) for case, key in keys.items()}
        return {
            case: "test" if place < test else "validation" if place < held_out else "train"
            for case, place in places.items()
        }

    def empty(self, drawn: Collection[str], among: Collection[str] = SPLITS) -> list[SplitName]:
        """Those of some splits that are to have a part of the cases, and got none."""
        return [s for s, part in self.fractions.items() if part and s in among and s not in drawn]

    def digested(self, table: Mapping[str, str] | None = None) -> dict[str, Any]:
        """All that says which case is in which split, for digests. Lists are what they always were;
        fractions have meant other cases before there were thresholds. Where a table lies is not in
        it."""
        by_regex = isinstance(self.group, str)
        told = self.model_dump(mode="json", exclude=None if by_regex else {"group"})
        if self.train is None:
            told["drawn_by"] = "threshold"
        return told | ({"patients": dict(table)} if table is not None else {})


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
        split: by fraction.
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
