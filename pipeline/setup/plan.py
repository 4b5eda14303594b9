"""`pipeline plan`: what stage one will take, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.cache.schema import StorageConfig
from pipeline.case_sizes import case_sizes
from pipeline.data.registry import Registry
from pipeline.errors import RegistryError
from pipeline.folder import Folder
from pipeline.identity import claim_dataset, claim_teacher
from pipeline.log import Log, print_table
from pipeline.planning.probe import Probe, probe
from pipeline.planning.rates import KINDS, Estimate, estimate_all
from pipeline.planning.record import write_record
from pipeline.planning.space import Space, look_at, on_disk, shortfall, size
from pipeline.planning.todo import Todo, find_todo
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.units import open_teacher


class Settings(Protocol):
    """What a plan needs to know of stage one's configuration."""

    @property
    def splits(self) -> Sequence[str]:
        """Cases of other splits are left out."""

    @property
    def window(self) -> WindowConfig:
        """How teachers run."""

    @property
    def storage(self) -> StorageConfig:
        """How arrays are stored."""


@dataclass(frozen=True)
class Plan:
    """What is left to do and what it takes.

    Attributes:
        todo: units there and to make.
        parts: `cases` and each teacher -> estimate of its missing units.
        probe: what was measured; None if nothing is left to do.
        space: free space and quota.
        problem: what does not fit; empty if all does.
        unreadable: cases without a readable header -> why; they are not in the numbers.
    """

    todo: Todo
    parts: Mapping[str, Estimate]
    probe: Probe | None
    space: Space
    problem: str
    unreadable: Mapping[str, Exception]

    @property
    def total(self) -> Estimate:
        """All parts together."""
        total = Estimate()
        for part in self.parts.values():
            total.add(part)
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = {**self.parts, "total": self.total}
        return {
            "fits": not self.problem,
            "problem": self.problem,
            "units": {"to_make": self.todo.num_missing, "cached": self.todo.num_cached},
            "cached_bytes": self.todo.cached_bytes,
            "to_make": {what: _plain(part) for what, part in rows.items()},
            "bytes_on_disk": on_disk(self.parts.values(), self.space.block_bytes),
            "memory_bytes": None if self.probe is None else self.probe.memory_bytes,
            "write_bytes_per_s": None if self.probe is None else self.probe.write_bytes_per_s,
            "space": self.space.to_json(),
            "unreadable": {case: str(error) for case, error in self.unreadable.items()},
            "probe": [] if self.probe is None else [s.model_dump() for s in self.probe.samples],
        }


def make_plan(
    settings: Settings,
    registry: Registry,
    work: Folder,
    *,
    log: Log,
    quota_bytes: int | None = None,
    device: str = "auto",
    window_batch: int = 1,
) -> Plan:
    """Measures two cases and estimates the rest from headers; what is cached is subtracted.

    The measured rates and the quota are kept in `reports/plan.json`, where stage one finds them.

    Args:
        settings: of stage one.
        registry: read with its files.
        work: the work folder; the probe is made, and removed, on its disk.
        log: where progress goes.
        quota_bytes: what the work folder may hold.
        device: auto, cpu, cuda, cuda:1.
        window_batch: windows per forward pass.

    Raises:
        PipelineError: no readable case, a teacher that does not load, a probe that fails, or an
            entry of the index that is another project's.
    """
    sizes, unreadable = case_sizes(registry, settings.splits)
    if not sizes:
        first = next((f" The first: {case}, {why}" for case, why in unreadable.items()), "")
        raise RegistryError(
            f"no case of the splits {', '.join(settings.splits)} has a readable header.{first}",
            where=registry.path,
            fix="Check `splits` and the datasets' files; a phantom is made by `pipeline phantom`.",
        )
    for case, error in unreadable.items():
        log.warn(f"{case} is left out: {error}")
    teachers = {
        name: open_teacher(
            name, registry, window=settings.window, storage=settings.storage,
            device=device, window_batch=window_batch,
        )
        for name in registry.teachers
    }  # fmt: skip
    indexed = {name: loaded.indexed for name, loaded in teachers.items()}
    for dataset in registry.datasets:
        claim_dataset(work, registry, dataset)
    for teacher in indexed.values():
        claim_teacher(work, registry, teacher)
    todo = find_todo(work, registry, sizes, indexed, settings.storage)
    measured = None
    if todo.num_missing:
        measured = probe(
            registry, work, todo, teachers,
            storage=settings.storage, log=log,
        )  # fmt: skip
        write_record(work, measured.samples, settings.storage, indexed, quota_bytes)
    parts = estimate_all(todo, measured.samples if measured else ())
    space = look_at(work, quota_bytes)
    return Plan(todo, parts, measured, space, shortfall(parts.values(), space), unreadable)


def print_plan(found: Plan) -> None:
    """Tables, for people."""
    rows = [
        [
            what,
            str(part.units),
            *(size(part.num_bytes[kind]) for kind in KINDS),
            size(part.total_bytes),
            str(round(part.files)),
            str(part.inodes),
            _time(part.seconds),
        ]
        for what, part in {**found.parts, "total": found.total}.items()
    ]
    columns = ["to make", "units", *KINDS, "bytes", "files", "inodes", "time"]
    print_table("Plan of stage one", columns, rows)
    space, need = found.space, on_disk(found.parts.values(), found.space.block_bytes)
    lines = [
        ["already there", f"{found.todo.num_cached} units, {size(found.todo.cached_bytes)}"],
        ["needed on disk", _needed(need, space)],
        ["free", _free(space)],
    ]
    if space.quota_bytes is not None:
        held = f"{size(space.quota_bytes)}, of which {size(space.used_bytes)} are used"
        lines.append(["quota", held])
    if found.probe is not None:
        writing = need / found.probe.write_bytes_per_s
        speed = size(found.probe.write_bytes_per_s)
        lines += [
            ["peak memory", f"{size(found.probe.memory_bytes)} (largest case, one process)"],
            ["disk", f"writes {speed}/s: {_time(writing)} of the time above"],
            ["probe", ", ".join(dict.fromkeys(s.case for s in found.probe.samples))],
        ]
    if found.unreadable:
        lines.append(["left out", f"{len(found.unreadable)} cases without a readable header"])
    print_table("Space, memory, disk", ["", ""], lines)


def _plain(part: Estimate) -> dict[str, Any]:
    return {
        "units": part.units,
        "bytes": {kind: round(value) for kind, value in part.num_bytes.items()},
        "total_bytes": part.total_bytes,
        "files": round(part.files),
        "inodes": part.inodes,
        "hours": round(part.seconds / 3600, 4),
    }


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _needed(need: int, space: Space) -> str:
    blocks = f" (files end on blocks of {size(space.block_bytes)})" if space.block_bytes else ""
    return f"{size(need)}{blocks}"


def _free(space: Space) -> str:
    if space.free_bytes is None:
        return "an object store does not fill; --quota sets a limit"
    return f"{size(space.free_bytes)}, {_count(space.free_inodes)} inodes"


def _count(number: int | None) -> str:
    return "unlimited" if number is None else f"{number:,}"
