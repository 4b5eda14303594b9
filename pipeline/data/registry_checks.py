"""What no single field of a registry can know: names that must agree, and files that must exist.

All of it works on the raw data, so that it also runs, for what can be read, when other parts of
the file are wrong: all mistakes are told in one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.config import Document, Problem
from pipeline.data.dataset_entry import SPLITS, FilesEntry


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
    """Patterns that match nothing, images without a label, cases that do not exist."""
    problems = []
    for name, entry in _mapping(_mapping(document.data).get("datasets")).items():
        part = {k: v for k, v in _mapping(entry).items() if k in FilesEntry.model_fields}
        try:
            files = FilesEntry.model_validate(part)
        except ValidationError:
            continue  # reported with the schema
        pairs, findings = files.find(document.path.parent)
        problems += [Problem(("datasets", name), finding) for finding in findings]
        for split, index, case in _split_cases(_mapping(entry)):
            if pairs and case not in pairs:
                where = ("datasets", name, "split", split, index)
                fix = "Correct the name, or remove it."
                problems.append(Problem(where, f"there is no case {case}.", fix))
    return problems


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
