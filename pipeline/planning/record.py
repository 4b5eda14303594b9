"""What a plan measured, kept beside the cache for stage one's own check; and that check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from pipeline.cache.index import IndexedTeacher
from pipeline.cache.schema import StorageConfig
from pipeline.cache.store import write_json
from pipeline.case_sizes import case_sizes
from pipeline.config import Config
from pipeline.data.registry import Registry
from pipeline.errors import SpaceError
from pipeline.folder import Folder, read_text
from pipeline.log import Log
from pipeline.planning.rates import Sample, estimate_all, least
from pipeline.planning.space import look_at, shortfall
from pipeline.planning.todo import CASES, Todo, find_todo

_FILE = "reports/plan.json"


class Record(Config):
    """`reports/plan.json`.

    Attributes:
        storage: that the samples were made with.
        teachers: teacher -> digest.
        samples: the units of the probe.
        quota_bytes: what the work folder may hold.
    """

    storage: StorageConfig
    teachers: dict[str, str]
    samples: tuple[Sample, ...]
    quota_bytes: int | None


def write_record(
    work: Folder,
    samples: Sequence[Sample],
    storage: StorageConfig,
    teachers: Mapping[str, IndexedTeacher],
    quota_bytes: int | None,
) -> None:
    """Keeps what was measured."""
    digests = {name: teacher.digest for name, teacher in teachers.items()}
    record = Record(
        storage=storage, teachers=digests, samples=tuple(samples), quota_bytes=quota_bytes
    )
    write_json(work / _FILE, record.model_dump(mode="json"))


def read_record(work: Folder) -> Record | None:
    """The latest plan; None if there is none, or none that this program can read."""
    try:
        return Record.model_validate_json(read_text(work / _FILE))
    except (OSError, ValueError, ValidationError):
        return None


def check_space(
    registry: Registry,
    work: Folder,
    teachers: Mapping[str, IndexedTeacher],
    *,
    splits: Sequence[str],
    storage: StorageConfig,
    log: Log,
    force: bool,
) -> None:
    """Refuses what will not fit, by headers and receipts alone; with `force` it only warns.

    A plan with the same storage and teachers gives the rates, and any plan the quota; without one
    only what the units take at the least is held against the free space.

    Raises:
        SpaceError: what stage one has still to make does not fit.
    """
    sizes, _ = case_sizes(registry, splits)
    todo = find_todo(work, registry, sizes, teachers, storage)
    record = read_record(work)
    samples = [] if record is None else _valid_samples(record, storage, teachers)
    if _covers(todo, samples):
        parts, basis = estimate_all(todo, samples), "Measured by `pipeline plan`."
    else:
        organs = {name: len(teacher.organs) for name, teacher in teachers.items()}
        parts = least(todo, organs)
        basis = "This is the least that it can be; `pipeline plan` measures."
    space = look_at(work, None if record is None else record.quota_bytes)
    problem = shortfall(parts.values(), space)
    if not problem:
        return
    error = SpaceError(
        f"{problem} {basis}",
        where=work,
        fix="Make room, choose another --work, leave out `splits` or `taps`, plan again with "
        "another --quota, or start anyway with --force; units that are done stay done.",
    )
    if not force:
        raise error
    log.warn(str(error))


def _valid_samples(
    record: Record, storage: StorageConfig, teachers: Mapping[str, IndexedTeacher]
) -> list[Sample]:
    if record.storage != storage:
        return []
    same = {name for name, t in teachers.items() if record.teachers.get(name) == t.digest}
    return [s for s in record.samples if s.what == CASES or s.what in same]


def _covers(todo: Todo, samples: Sequence[Sample]) -> bool:
    measured = {sample.what for sample in samples}
    return all(what in measured for what, cases in todo.missing.items() if cases)
