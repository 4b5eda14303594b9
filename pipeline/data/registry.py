"""What no single field of a registry can know: names that must agree, and files that must exist.

All of it works on the raw data, so that it also runs, for what can be read, when other parts of
the file are wrong: all mistakes are told in one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from pipeline.config import Document, Problem
from pipeline.data.dataset_entry import FilesEntry
from pipeline.data.split_entry import SPLITS, PatientColumn, SplitEntry, check_patients
from pipeline.errors import RegistryError


def check_names(document: Document) -> list[Problem]:
    """Organs, label values, channels, datasets and splits that contradict each other."""
    organs, datasets, teachers = (
        _mapping(_mapping(document.data).get(key)) for key in ("organs", "datasets", "teachers")
    )
    problems = _check_ids(organs)
    known: set[str] = set()
    for name, entry in datasets.items():
        annotated = _mapping(_mapping(entry).get("annotated"))
        known |= set(annotated)
        problems += _check_values(name, _mapping(entry), annotated)
        problems += _unknown_organs(("datasets", name, "annotated"), annotated, organs)
        problems += _check_split(name, _mapping(entry))
    problems += read_tables(document)[1]
    for name, entry in teachers.items():
        expert = _mapping(_mapping(entry).get("organs"))
        known |= set(expert)
        problems += _check_channels(name, _mapping(entry), expert)
        problems += _check_trained_on(name, _mapping(entry), expert, datasets)
        problems += _unknown_organs(("teachers", name, "organs"), expert, organs)
    for organ in organs:
        if organ not in known:
            fix = "Remove it, or add a dataset or teacher for it."
            what = f"no dataset annotates {organ} and no teacher knows it."
            problems.append(Problem(("organs", organ), what, fix))
    return problems


def check_files(document: Document) -> list[Problem]:
    """Patterns that match nothing, images without a label, cases that do not exist, patients who
    are in two splits."""
    problems = []
    found: dict[str, list[str]] = {}
    for name, entry in _mapping(_mapping(document.data).get("datasets")).items():
        part = {k: v for k, v in _mapping(entry).items() if k in FilesEntry.model_fields}
        try:
            files = FilesEntry.model_validate(part)
        except ValidationError:
            continue  # reported with the schema
        pairs, findings = files.find(document.path.parent)
        found[name] = sorted(pairs)
        problems += [Problem(("datasets", name), finding) for finding in findings]
        for split, index, case in _split_cases(_mapping(entry)):
            if pairs and case not in pairs:
                where = ("datasets", name, "split", split, index)
                fix = "Correct the name, or remove it."
                problems.append(Problem(where, f"there is no case {case}.", fix))
    return problems + _check_groups(document, found)


def read_tables(document: Document) -> tuple[dict[str, dict[str, str]], list[Problem]]:
    """Dataset -> case -> patient, by the CSVs that `split.group` names, and what is wrong there."""
    tables: dict[str, dict[str, str]] = {}
    problems = []
    for name, split in _splits(document).items():
        if isinstance(split.group, PatientColumn):
            try:
                tables[name] = split.group.read(document.path.parent)
            except RegistryError as error:
                here = ("datasets", name, "split", "group")
                problems.append(Problem(here, f"{error.where}: {error.what}", error.fix))
    return tables, problems


def _check_groups(document: Document, found: Mapping[str, list[str]]) -> list[Problem]:
    """Cases of no patient, and patients who are in two splits, of a dataset or of several."""
    problems = []
    tables, unread = read_tables(document)
    first: dict[str, tuple[str, str, str]] = {}
    for name, split in _splits(document).items():
        here = ("datasets", name, "split", "group")
        if split.group is None or any(problem.location == here for problem in unread):
            continue
        listed = split.lists
        cases = [case for case in found.get(name, []) if split.train is None or case in listed]
        patients = split.patients(cases, tables.get(name))
        try:
            check_patients(split, cases, patients)
        except RegistryError as error:
            problems.append(Problem(here, error.what, error.fix))
            continue
        drawn = split.assign(cases, tables.get(name))
        torn = []
        for case, patient in patients.items():
            other = first.setdefault(patient, (name, case, drawn[case]))
            if other[2] != drawn[case]:
                torn.append((patient, case, other))
        if torn:
            patient, case, (dataset, twin, where) = torn[0]
            what = (
                f"patient {patient} is in two splits: {case} in {drawn[case]}, "
                f"{twin} of {dataset} in {where}"
            )
            what += f" (and {len(torn) - 1} more)." if len(torn) > 1 else "."
            fix = "A patient belongs to one split, in all datasets: with fractions, give all the "
            fix += "same `seed` and fractions; in lists, move the case."
            problems.append(Problem(here, what, fix))
    return problems


def _splits(document: Document) -> dict[str, SplitEntry]:
    """Dataset -> its split, where it can be read; what is wrong is reported with the schema."""
    found = {}
    for name, entry in _mapping(_mapping(document.data).get("datasets")).items():
        with suppress(ValidationError):
            found[name] = SplitEntry.model_validate(_mapping(entry).get("split") or {})
    return found


def _check_ids(organs: Mapping[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    owner: dict[int, str] = {}
    for organ, organ_id in organs.items():
        first = owner.setdefault(organ_id, organ) if isinstance(organ_id, int) else organ
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
            if organ in annotated and str(value) == "0":
                what, fix = "label value 0 is background.", "Use the organ's own value."
                problems.append(Problem(("datasets", name, *where), what, fix))
    return problems


def _check_split(name: str, entry: Mapping[str, Any]) -> list[Problem]:
    problems = []
    owner: dict[str, str] = {}
    for split, index, case in _split_cases(entry):
        if case in owner:
            what = f"case {case} is already in {owner[case]}."
            where = ("datasets", name, "split", split, index)
            problems.append(Problem(where, what, "A case belongs to one split, once."))
        owner.setdefault(case, split)
    return problems


def _check_channels(
    name: str, entry: Mapping[str, Any], expert: Mapping[str, Any]
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
    return problems


def _check_trained_on(
    name: str, entry: Mapping[str, Any], expert: Mapping[str, Any], datasets: Mapping[str, Any]
) -> list[Problem]:
    trained_on = entry.get("trained_on")
    here = ("teachers", name, "trained_on")
    if not isinstance(trained_on, str) or not datasets:
        return []
    if trained_on not in datasets:
        fix = f"Datasets are: {', '.join(map(str, datasets))}."
        return [Problem(here, f"there is no dataset {trained_on!r}.", fix)]
    annotated = _mapping(_mapping(datasets[trained_on]).get("annotated"))
    return [
        Problem(
            here,
            f"{trained_on} does not annotate {organ}, so it cannot teach it.",
            "Choose the dataset that does.",
        )
        for organ in expert
        if organ not in annotated
    ]


def _unknown_organs(
    where: tuple[str, ...], named: Mapping[str, Any], organs: Mapping[str, Any]
) -> list[Problem]:
    fix = f"Add it to `organs`, or correct its name; organs are: {', '.join(map(str, organs))}."
    return [
        Problem((*where, organ), f"{organ} is not one of the registry's organs.", fix)
        for organ in named
        if organs and organ not in organs
    ]


def _split_cases(entry: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(split, position, case) of every case that a split by list names."""
    parts = _mapping(entry.get("split"))
    for split in SPLITS:
        cases = parts.get(split)
        for index, case in enumerate(cases if isinstance(cases, list) else []):
            if isinstance(case, str):
                yield split, index, case


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
