"""What a run of stage one leaves in the index; and one part of it among others that nobody
coordinates: which cases are its own, and what the others have left."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_records,
    dataset_file,
    read_dataset_index,
    write_case_record,
    write_dataset_index,
    write_failed_record,
)
from pipeline.cache.sealed import read_sealed
from pipeline.case_sizes import case_sizes
from pipeline.config import digest
from pipeline.data.files import CaseFiles
from pipeline.data.registry import Registry
from pipeline.engine.parts import Part, share
from pipeline.errors import CacheStale
from pipeline.folder import Folder, matching, read_text, remove
from pipeline.identity import claim_dataset


def own_cases(
    registry: Registry, files: Sequence[CaseFiles], splits: Sequence[str], part: Part
) -> list[CaseFiles]:
    """The cases of a part, so that all parts take about as long: cost follows the voxels of the CT
    and those on the student grid, by headers alone, and is the same factor for every teacher.

    A case whose header cannot be read belongs to a part too, which reports it.
    """
    sizes, _ = case_sizes(registry, splits)
    known = {size.source.name: float(size.native_voxels + size.voxels) for size in sizes}
    costs = {case.name: known.get(case.name, 1.0) for case in files}
    own = set(share(costs, part.of)[part.number])
    return [case for case in files if case.name in own]


def index_cases(
    registry: Registry,
    work: Folder,
    indexed: Sequence[IndexedCase],
    datasets: Iterable[str],
    splits: Sequence[str],
) -> None:
    """The index of whole datasets, by a run over all their cases. Cases of splits that it leaves
    out stay as an earlier run saw them.

    Raises:
        WorkFolderError: it cannot be written, or the entry is another project's.
    """
    for dataset in datasets:
        key = registry.dataset_key(dataset)
        origin = claim_dataset(work, registry, dataset)
        known = registry.cases(dataset)
        left_out = {c.case for c in known if c.split not in splits}
        try:
            earlier = [c for c in read_dataset_index(work, dataset, key) if c.case in left_out]
        except CacheStale:
            earlier = []
        cases = [*(case for case in indexed if case.dataset == dataset), *earlier]
        absent = {c.case for c in known} - {c.case for c in cases}
        write_dataset_index(work, dataset, key, cases, origin=origin, left_out=absent)


def held_out_since(registry: Registry, work: Folder, files: Sequence[CaseFiles]) -> list[str]:
    """Validation and test cases that trained when another registry filled this work folder: what
    was trained then has seen them. Once this registry is in the index, nothing more is said.

    Raises:
        WorkFolderError: the index cannot be listed.
    """
    new = {
        dataset
        for dataset in registry.datasets
        for key in [registry.dataset_key(dataset)]
        if not dataset_file(work, dataset, key).exists() and not case_records(work, dataset, key)
    }
    trained = set()
    for pattern in ("datasets/[!.]*.json", "datasets/*/[!.]*.json") if new else ():
        for path in matching(work / "index", pattern):
            with suppress(OSError, ValueError, KeyError, TypeError):  # which others report
                content = read_sealed(path)
                trained |= {
                    f"{content['dataset']}/{case['case']}"
                    for case in content["cases"]
                    if case["split"] == "train"
                }
    return [c.name for c in files if c.dataset in new and c.split != "train" and c.name in trained]


def record_cases(
    registry: Registry, work: Folder, indexed: Iterable[IndexedCase], failed: Iterable[CaseFiles]
) -> None:
    """Leaves a record of each own case; in that of one that failed now, there is no case.

    Raises:
        WorkFolderError: it cannot be written, or the entry is another project's.
    """
    keys = {name: registry.dataset_key(name) for name in registry.datasets}
    origins = {name: claim_dataset(work, registry, name) for name in registry.datasets}
    for case in indexed:
        name = case.dataset
        write_case_record(work, keys[name], case, origin=origins[name])
    for source in failed:
        name = source.dataset
        write_failed_record(work, name, keys[name], source.case, origin=origins[name])


def forget_dataset(registry: Registry, work: Folder, dataset: str) -> None:
    """Stage two must not find a dataset that turned out to be wrong as a whole."""
    key = registry.dataset_key(dataset)
    for record in case_records(work, dataset, key):
        remove(record)


@dataclass(frozen=True)
class Everyone:
    """What all parts together have done so far.

    Attributes:
        cases: of all parts, as far as they are on the student grid.
        all_prepared: each case of the registry is among them.
        all_finished: every other part has come to its end, whatever became of its units.
    """

    cases: Sequence[IndexedCase]
    all_prepared: bool
    all_finished: bool


def look_at_everyone(
    registry: Registry, work: Folder, files: Sequence[CaseFiles], part: Part, run: str
) -> Everyone:
    """Reads what all parts have left.

    Args:
        registry: what exists.
        work: the work folder.
        files: the cases of all parts.
        part: the one that asks.
        run: from `run_digest`.
    """
    wanted = {case.name for case in files}
    cases: list[IndexedCase] = []
    for dataset in registry.datasets:
        try:
            found = read_dataset_index(work, dataset, registry.dataset_key(dataset))
        except CacheStale:
            continue
        cases += [case for case in found if case.name in wanted]
    finished = all(_finished_run(work, other) == run for other in part.others())
    return Everyone(cases, len(cases) == len(wanted), finished)


def run_digest(
    registry: Registry, teachers: Mapping[str, IndexedTeacher], settings: Any, part: Part
) -> str:
    """What parts have in common that belong together."""
    return digest(
        {
            "datasets": {name: registry.dataset_key(name) for name in registry.datasets},
            "teachers": {name: teacher.digest for name, teacher in teachers.items()},
            "settings": settings,
            "num_parts": part.of,
        }
    )


def report_file(work: Folder, part: Part | None) -> Folder:
    """Where stage one's report is; that of a part says, by being there, that it came to its end."""
    name = "cache-teachers" if part is None else f"cache-teachers.{part.tag}"
    return work / "reports" / f"{name}.json"


def begin_part(work: Folder, part: Part) -> None:
    """A part that runs again has not come to its end."""
    remove(report_file(work, part))


def _finished_run(work: Folder, part: Part) -> str | None:
    try:
        content = json.loads(read_text(report_file(work, part)))
        return str(content["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
