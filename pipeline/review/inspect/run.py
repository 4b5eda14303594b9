"""What `pipeline inspect` does, with a case and without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.cache.reader import CachedCase
from pipeline.cohort import open_case, open_cohort
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing, ConfigError, PipelineError
from pipeline.folder import (
    Folder,
    contains,
    json_with,
    refuse_foreign,
    replace_file,
    replace_files,
    writing,
)
from pipeline.inspection.cohort_table import CohortNumbers, measure_cohort, to_csv
from pipeline.inspection.improbable import flagged
from pipeline.inspection.looks import View, look_at
from pipeline.inspection.maps import compute_maps, files_of, write_maps
from pipeline.inspection.measure import CaseNumbers, lazy_numbers, numbers_of
from pipeline.inspection.picture import draw_case
from pipeline.log import Log
from pipeline.reliability import read_witnesses, trusting


def inspect_case(
    registry: Registry,
    work: Folder,
    name: str,
    view: View,
    output: Path,
    *,
    allow_missing: bool = False,
) -> tuple[CaseNumbers, list[Path]]:
    """Writes `<output>/<dataset>/<case>/`: maps as NIfTI, colours, `figure.png`, `numbers.json`.

    Args:
        registry: read without its files.
        work: the work folder.
        name: `dataset/case`.
        view: how regions are formed.
        output: where to write; files of an earlier call are replaced.
        allow_missing: leave out teachers whose units are missing or damaged.

    Returns:
        The numbers, flagged by the case alone, and the files.

    Raises:
        ConfigError: the registry has no teacher, or there are files that `inspect` did not write.
        RegistryError: no such dataset.
        CacheError: the case or a unit is not in the cache, or is damaged.
        WorkFolderError: the output cannot be written.
    """
    _check_teachers(registry)
    teachers = list(registry.teachers)
    case = open_case(work, registry, name, teachers, allow_missing=allow_missing)
    (case,) = _believed([case], registry, work, view)
    look = look_at(case, registry.label_space, view)
    folder = output / name
    told, figure = folder / "numbers.json", folder / "figure.png"
    is_ours = json_with(told, "case", "volume_ml") is not None
    targets = [told, figure, *(folder / file for file in files_of(look))]
    refuse_foreign("inspect", [(path, is_ours) for path in targets])
    lazy = lazy_numbers(case, look)
    found, computed = compute_maps(case, look, lazy.arrays)
    numbers = flagged(numbers_of(case, look, lazy, computed), {})
    with writing(folder, "Name another folder with --output."):
        # First: by it the next call knows the folder for its own.
        replace_file(told, json.dumps(numbers.model_dump(mode="json"), indent=1).encode())
        written = write_maps(folder, case, look, found)
        draw_case(figure, case, look, found, numbers)
    return numbers, [*written, figure, told]


def inspect_cohort(
    registry: Registry,
    work: Folder,
    view: View,
    output: Path,
    *,
    allow_missing: bool = False,
    workers: int = 0,
    log: Log,
) -> CohortNumbers:
    """Measures every case of the registry; writes `<output>/cohort.csv` and `cohort.json`.

    A case that lacks a teacher's unit, or cannot be read, is told of in `failed`; the others are
    measured all the same.

    Args:
        registry: read without its files.
        work: the work folder.
        view: how regions are formed.
        output: where to write.
        allow_missing: measure a case by the teachers that it has.
        workers: processes; 0 for this one. Changes speed only.
        log: where progress goes.

    Raises:
        ConfigError: the registry has no teacher, or there are files that `inspect` did not write.
        CacheStale: stage one has not seen the registry as it is now.
        CacheMissing: there is no case at all.
        WorkFolderError: the output cannot be written.
    """
    _check_teachers(registry)
    table, whole = output / "cohort.csv", output / "cohort.json"
    ours = {
        table: contains(table, "improbable\n"),
        whole: json_with(whole, "cases", "usual", "pairs") is not None,
    }
    refuse_foreign("inspect", ours.items())
    cohort = open_cohort(work, registry, teachers=list(registry.teachers))
    failed: dict[str, PipelineError] = {}
    for unit, error in cohort.problems.items():
        if not allow_missing or " x " not in unit:
            failed[unit] = error
    incomplete = {unit.rpartition(" x ")[2] for unit in failed}
    cases = [case for case in cohort.cases if case.name not in incomplete]
    if not cohort.cases:
        raise next(iter(cohort.problems.values()), _no_case(work))
    believed = _believed(cases, registry, work, view)
    found = measure_cohort(believed, registry.label_space, view, workers=workers, log=log)
    found = CohortNumbers(found.cases, found.usual, {**failed, **found.failed})
    texts = {table: to_csv(found), whole: json.dumps(found.to_json(), indent=1)}
    with writing(output, "Name another folder with --output."):
        replace_files({path: text.encode() for path, text in texts.items()})
    return found


def _believed(
    cases: Sequence[CachedCase], registry: Registry, work: Folder, view: View
) -> Sequence[CachedCase]:
    """As a training would believe their teachers; cases of every split alike."""
    if view.reliability is None:
        return cases
    witnesses = read_witnesses(work, registry, Log(quiet=True))
    labelled = open_cohort(work, registry, splits=("train", "validation")).cases
    return trusting(cases, labelled, witnesses, view.reliability)


def _check_teachers(registry: Registry) -> None:
    if not registry.teachers:
        raise ConfigError(
            "the registry has no teachers, so there are no regions to look at.",
            where=registry.path,
            fix="Add teachers and run `pipeline cache-teachers`.",
        )


def _no_case(work: Folder) -> CacheError:
    return CacheMissing(
        "there is no case in the cache.", where=work, fix="Run `pipeline cache-teachers`."
    )
