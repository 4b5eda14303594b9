"""`cache why CASE`: would stage one reuse a unit, and if not, what is different, field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_path,
    read_index,
    unit_digest,
    unit_path,
)
from pipeline.cache.places import Place, find_units
from pipeline.cache.provenance import Inputs, differing
from pipeline.cache.receipt import Receipt, read_receipt
from pipeline.cache.schema import StorageConfig
from pipeline.config import short
from pipeline.data.files import CaseFiles
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CacheMissing, PipelineError, RegistryError
from pipeline.folder import Folder
from pipeline.inventory.wording import accepted_in_words, counted, print_changes
from pipeline.log import print_table
from pipeline.prepare import identify_case
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.units import open_teacher

Verdict = Literal["reused", "made", "made again", "left out", "unknown"]


@dataclass(frozen=True)
class Reason:
    """What the next run of stage one would do about one unit.

    Attributes:
        unit: its name.
        verdict: reused; made: there is none; made again: it is damaged; left out: by its split;
            unknown: its digest cannot be computed here.
        because: in words.
        nearest: the unit of this case and teacher that differs least; None if there is no other.
        differences: `field: its value -> value now`, against the nearest.
    """

    unit: str
    verdict: Verdict
    because: str
    nearest: Folder | None = None
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "unit": self.unit,
            "verdict": self.verdict,
            "because": self.because,
            "nearest": None if self.nearest is None else str(self.nearest),
            "differences": list(self.differences),
        }


def why(
    work: Folder,
    registry: Registry,
    case: str,
    *,
    window: WindowConfig,
    storage: StorageConfig,
    splits: Sequence[str] = ("train", "validation", "test"),
) -> list[Reason]:
    """Explains the case unit and every teacher's unit of one case; hashes its files and weights.

    Args:
        work: the work folder.
        registry: what exists.
        case: `dataset/case`.
        window: as stage one would be run.
        storage: likewise.
        splits: likewise.

    Raises:
        RegistryError: no such case.
        GeometryError: its files cannot be read.
    """
    source = _find(registry, case)
    if source.split not in splits:
        because = f"it is in split {source.split}, which these settings do not name"
        return [Reason(case, "left out", because)]
    grid = registry.grid.spacing_mm
    indexed, inputs = identify_case(registry, source, spacing_mm=grid, storage=storage)
    places = find_units(work, dataset=source.dataset, case=source.case)
    own = [place for place in places if place.teacher is None]
    there = {path: receipt.inputs for path, receipt in _receipts(own).items()}
    reasons = [_reason(case, case_path(work, indexed), indexed.digest, inputs, there)]
    for name in registry.teachers:
        unit = f"{name} x {case}"
        try:
            teacher = open_teacher(
                name, registry, window=window, storage=storage, device="cpu", window_batch=1
            ).indexed
        except PipelineError as error:
            reasons.append(Reason(unit, "unknown", f"the teacher cannot be loaded: {error}"))
            continue
        theirs = [place for place in places if place.teacher == name]
        reasons.append(_teacher_reason(work, unit, teacher, indexed, theirs))
    return reasons


def _teacher_reason(
    work: Folder, unit: str, teacher: IndexedTeacher, case: IndexedCase, places: Sequence[Place]
) -> Reason:
    index = {
        file.teacher.digest: file.teacher.inputs
        for file in read_index(work)[0]
        if file.teacher is not None
    }
    there = {path: _explained(receipt, index) for path, receipt in _receipts(places).items()}
    wanted = {**teacher.inputs, "image_sha256": case.image_sha256}
    path = unit_path(work, teacher, case)
    return _reason(unit, path, unit_digest(teacher, case), wanted, there)


def _reason(
    unit: str, path: Folder, expect: str, wanted: Inputs, there: Mapping[Folder, Inputs]
) -> Reason:
    try:
        receipt = read_receipt(path, expect=expect)
    except CacheMissing:
        pass
    except CacheError as error:
        return Reason(unit, "made again", f"what is there is damaged: {error.what}", path)
    else:
        because = f"same digest {short(receipt.digest)}, written {receipt.written}"
        because += accepted_in_words(receipt.notes)
        return Reason(unit, "reused", because, path)
    compared = {other: differing(inputs, wanted) for other, inputs in there.items()}
    if not compared:
        return Reason(unit, "made", "the cache holds nothing of it")
    nearest = min(compared, key=lambda other: (len(compared[other]), str(other)))
    lines = tuple(compared[nearest])
    because = f"differs in {counted(len(lines), 'input')} from the nearest that is cached"
    return Reason(unit, "made", because, nearest, lines)


def _explained(receipt: Receipt, index: Mapping[str, Inputs]) -> Inputs:
    """A teacher unit's inputs, with those that its teacher's digest is of, where they are known."""
    inputs = dict(receipt.inputs)
    teacher = receipt.teacher_inputs or index.get(inputs["teacher_digest"])
    if teacher is None:
        return inputs
    del inputs["teacher_digest"]
    return {**teacher, **inputs}


def _receipts(places: Sequence[Place]) -> dict[Folder, Receipt]:
    found = {}
    for place in places:
        with suppress(CacheError):
            found[place.path] = read_receipt(place.path)
    return found


def _find(registry: Registry, case: str) -> CaseFiles:
    dataset, _, name = case.partition("/")
    if dataset not in registry.datasets:
        known = ", ".join(registry.datasets)
        fix = f"A case is named dataset/case; datasets: {known}."
        raise RegistryError(f"there is no dataset {dataset!r}.", where=registry.path, fix=fix)
    sources = {source.case: source for source in registry.cases(dataset)}
    if name not in sources:
        some = ", ".join(list(sources)[:8])
        raise RegistryError(
            f"dataset {dataset} has no case {name!r} in any split.",
            where=registry.path,
            fix=f"Its cases: {some}{' and others' if len(sources) > 8 else ''}.",
        )
    return sources[name]


def print_reasons(reasons: Sequence[Reason]) -> None:
    """A table of verdicts, then what differs, for people."""
    rows = [[reason.unit, reason.verdict, reason.because] for reason in reasons]
    print_table("The next cache-teachers", ["unit", "", "because"], rows)
    print_changes("What differs", "there -> now", [(r.unit, r.differences) for r in reasons])
