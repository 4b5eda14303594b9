"""The text of a new registry: its values, and comments that say what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.data.splits import SplitEntry, fitting_seed
from pipeline.setup.init.datasets import FoundDataset
from pipeline.setup.init.meanings import Meanings, Named, in_flag
from pipeline.setup.init.teachers import FoundTeacher

_HEAD = """\
# Written by `pipeline init`; yours to edit. Paths are relative to this file. Tuples are in z, y, x
# order. docs/registry.md explains each field.
schema_version: 1

# Name -> id in stored labels and in the label maps that `pipeline predict` writes. 1 to 254. Keep
# an id once something is cached.
organs:
"""
_TRAIN = """\

# Organs without a teacher: take the # away, and `pipeline train-teachers` trains one.
"""


@dataclass(frozen=True)
class DatasetPart:
    """A dataset of the registry to be: `root` as it is to be written."""

    name: str
    root: str
    found: FoundDataset
    meanings: Meanings


@dataclass(frozen=True)
class TeacherPart:
    """A teacher of the registry to be: `weights` and `settings` as they are to be written."""

    name: str
    weights: str
    found: FoundTeacher
    organs: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any]


def registry_text(
    organs: Mapping[str, int],
    spacing_mm: Sequence[float],
    notes: Sequence[str],
    datasets: Sequence[DatasetPart],
    teachers: Sequence[TeacherPart],
) -> str:
    """The whole file; `notes` on the grid, a line each."""
    lines = [f"  {flow(name)}: {number}" for name, number in organs.items()]
    lines += [
        "",
        "# The student grid: one spacing for all; finer costs memory and time.",
        "# `pipeline plan --student` proposes patch, network and steps for it.",
    ]
    lines += [f"# {note}" for note in notes]
    lines += ["grid:", f"  spacing_mm: {flow(list(spacing_mm))}", "  orientation: RAS", ""]
    lines += ["datasets:"]
    drawn = [list(part.found.image_files()) for part in datasets if part.found.split is None]
    seed = fitting_seed(SplitEntry(), drawn) or 0
    for number, part in enumerate(datasets):
        lines += ([""] if number else []) + list(_dataset(part, seed))
    if teachers:
        lines += ["", "teachers:"]
    for number, teacher in enumerate(teachers):
        lines += ([""] if number else []) + list(_teacher(teacher))
    text = _HEAD + "\n".join(lines) + "\n"
    return text + _to_train(datasets, teachers)


def _dataset(part: DatasetPart, seed: int) -> Iterable[str]:
    found, meanings = part.found, part.meanings
    yield f"  {flow(part.name)}:  # {found.layout}"
    yield from (f"    # {note}" for note in found.notes)
    yield f"    root: {flow(part.root)}"
    if found.pairs is None:
        yield f"    images: {flow(found.images)}  # {{case}} names the case"
        yield f"    labels: {flow(found.labels)}"
    else:
        yield "    pairs:"
        for case, pair in found.pairs.items():
            yield f"      {flow(case)}: {flow(pair.model_dump())}"
    if found.names:
        yield f"    # values by the names of its own file: {_named(found.names)}"
    yield f"    annotated: {flow(_short(meanings.organs))}  # organ -> label value, or list"
    ignore = sorted({*meanings.ignore, *found.ignore})
    yield f"    ignore_values: {flow(ignore)}  # mean unknown: they teach nothing"
    yield f"    background_values: {flow(sorted(meanings.background))}  # none of the organs"
    if found.split is None:
        split = f"{{validation: 0.2, test: 0.0, seed: {seed}}}"
        yield f"    split: {split}  # by a hash of the name; the rest trains"
    else:
        yield "    split:  # as its own file has it"
        for split, cases in found.split.items():
            yield f"      {split}: {flow(list(cases))}"
    yield from (
        f"    {key}: {flow(value)}"
        for key, value in (("licence", found.licence), ("source", found.source))
        if value
    )


def _teacher(part: TeacherPart) -> Iterable[str]:
    found = part.found
    yield f"  {flow(part.name)}:"
    yield from (f"    # {note}" for note in found.notes)
    yield f"    kind: {found.kind}"
    yield f"    weights: {flow(part.weights)}"
    if found.names:
        yield f"    # channels by the names of its own files: {_named(found.names)}"
    yield f"    organs: {flow(_short(part.organs))}  # organ -> output channel, or list"
    if found.num_channels is not None:
        yield f"    num_channels: {found.num_channels}"
    yield from (f"    {key}: {flow(value)}" for key, value in part.settings.items())
    if found.kind in ("checkpoint", "monai-bundle"):
        yield "    # `pipeline check` tells which can be learnt: of an encoder, its stages"
        yield "    taps: []  # layers whose features are cached, for a student's feature term"


def _to_train(datasets: Sequence[DatasetPart], teachers: Sequence[TeacherPart]) -> str:
    """Commented entries for organs that no teacher knows."""
    known = {organ for teacher in teachers for organ in teacher.organs}
    lines: list[str] = []
    for part in datasets:
        organs = [organ for organ in part.meanings.organs if organ not in known]
        known |= set(organs)
        if not organs:
            continue
        channels = {organ: channel for channel, organ in enumerate(organs, start=1)}
        entry = {
            "kind": "checkpoint", "weights": f"teachers/{part.name}.pt", "organs": channels,
            "num_channels": len(organs) + 1, "trained_on": part.name,
        }  # fmt: skip
        lines += [f"  {flow(part.name)}:", *(f"    {k}: {flow(v)}" for k, v in entry.items())]
    if lines and not teachers:
        lines.insert(0, "teachers:")
    return _TRAIN + "".join(f"# {line}\n" for line in lines) if lines else ""


def _named(names: Iterable[Named]) -> str:
    """Values and names, on one line whatever stands in a file."""
    return " ".join(", ".join(f"{in_flag(n.values)} {n.name}" for n in names).split())


def _short(organs: Mapping[str, tuple[int, ...]]) -> dict[str, int | list[int]]:
    return {o: v[0] if len(v) == 1 else list(v) for o, v in organs.items()}


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()
