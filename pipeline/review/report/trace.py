"""What a run was made of and from: its folder, its units down to files and weights, the gate,
regions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline.cache.index import IndexedTeacher, read_index
from pipeline.cache.places import Place, find_units
from pipeline.cache.reader import CachedCase, Unit
from pipeline.config import digest, short
from pipeline.consensus.evidence import Evidence, read_evidence
from pipeline.consensus.gate import Row, elsewhere_rows, score_rows
from pipeline.data.labels import LabelSpace
from pipeline.data.registry import Registry
from pipeline.errors import CacheError, CheckpointError, ConfigError, PipelineError, listed
from pipeline.folder import Folder, is_local, json_with, parse_folder, read_bytes, read_text, sizes
from pipeline.log import Log
from pipeline.review.inspect.look import View
from pipeline.review.inspect.numbers import CaseNumbers, measure_cohort, pair_rows
from pipeline.review.units import run_folders
from pipeline.student.progress import History, parsed
from pipeline.student.settings import SupervisionConfig

# What a run's folder says of it: settings, inputs, marker, curves, files; nothing is loaded.


@dataclass(frozen=True)
class Training:
    """metrics.jsonl, and what a clock measured in it, if any: seconds of the steps that are in the
    file, and the share of them, 0 to 1, in which the loop waited for data."""

    history: History
    seconds: float | None
    data_wait: float | None


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder records it.

    Attributes:
        settings: `training` of its configuration, as written in config.json.
        inputs: cases, teachers and organs by digest, likewise.
        digest: of both; the run's digest.
        marker: content of finished.json; None for a run that is not finished.
        training: from metrics.jsonl; None if that cannot be read.
        files: name -> bytes, of every file of the run, earlier pages left out.
    """

    run: str
    folder: Folder
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    digest: str
    marker: Mapping[str, Any] | None
    training: Training | None
    files: Mapping[str, int]

    @property
    def space(self) -> LabelSpace:
        """The organs that it was trained for."""
        return LabelSpace(self.inputs["organs"])

    @property
    def cases(self) -> Mapping[str, str]:
        """`dataset/case` -> digest, of the training cases."""
        return dict(self.inputs["cases"])

    @property
    def validation(self) -> Mapping[str, str]:
        """`dataset/case` -> digest, of the validation cases."""
        return dict(self.inputs["validation"])

    @property
    def teachers(self) -> Mapping[str, str]:
        """Teacher -> digest."""
        return dict(self.inputs["teachers"])

    @property
    def student(self) -> str | None:
        """The file with its weights: student.pt, else best.pt, else None."""
        return next((name for name in ("student.pt", "best.pt") if name in self.files), None)

    @property
    def view(self) -> View:
        """How its training formed regions; by default where its settings are of another version."""
        said = self.settings.get("supervision", {})
        fields = ("margin", "labels_win", "confidence")
        try:
            chosen = SupervisionConfig.model_validate({k: said[k] for k in fields if k in said})
        except ValidationError:
            return View()
        temperatures = {}
        for who, value in self.inputs.get("temperatures", {}).items():
            teacher, _, organ = who.partition(": ")
            temperatures[teacher, organ] = float(value)
        return View(chosen.margin, chosen.labels_win, chosen.confidence, temperatures)


def read_run(work: Folder, run: str) -> RunRecord:
    """Reads a run's folder, by its name, of a comparison's run `<comparison>/<run>`, or its path.

    Raises:
        ConfigError: there is no such run.
        CheckpointError: its config.json cannot be read.
    """
    known = run_folders(work)
    if run not in known:
        run = next((n for n, f in known.items() if _place(f) == _place(parse_folder(run))), run)
    if run not in known:
        here = f"Runs here: {listed([*known], 8)}."
        raise ConfigError(
            f"there is no run {run!r}.",
            where=work / "students",
            fix=here if known else "Run `pipeline train-student` first.",
        )
    folder = known[run]
    path = folder / "config.json"
    try:
        content = json.loads(read_text(path))
        settings, inputs = dict(content["config"]), dict(content["inputs"])
        record = RunRecord(
            run=run,
            folder=folder,
            settings=settings,
            inputs=inputs,
            digest=digest({"config": settings, "inputs": inputs}),
            marker=json_with(folder / "finished.json"),
            training=_training(folder / "metrics.jsonl"),
            files={n: s for n, s in sorted(sizes(folder).items()) if not n.endswith(".html")},
        )
        _ = record.space, record.cases, record.validation, record.teachers
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the run's record cannot be read ({type(error).__name__}: {error}).",
            where=path,
            fix="`pipeline train-student` writes it when a run begins; without it nobody knows "
            "what the run was trained from.",
        ) from error
    return record


def _place(folder: Folder) -> str:
    return str(folder.resolve() if is_local(folder) else folder).rstrip("/")


def _training(path: Folder) -> Training | None:
    """Lines up to one that a kill cut short; None without a line."""
    try:
        text = read_bytes(path)
    except OSError:
        return None
    history = History()
    seconds: list[float] = []
    waits: list[float] = []
    for line in map(parsed, text.splitlines()):
        if line is None:
            break
        history.add(line)
        timing = line.get("timing", {})
        if "loss" in line and timing:
            seconds.append(float(timing["seconds"]))
            waits.append(float(timing["seconds"]) * float(timing["data_wait"]))
    if not history.step:
        return None
    total = sum(seconds)
    return Training(history, total if seconds else None, sum(waits) / total if total else None)


# What a run was trained from, followed by digests through the cache down to files and weights.
# The registry is not asked: it may have changed since. Names of units come from the digests that
# the run recorded, and what made them from their receipts.

TRAINING, VALIDATION = "train", "validation"
GONE = "no longer in the cache"


@dataclass(frozen=True)
class Traced:
    """A unit, open for reading, or why it is not: it is gone, damaged, or of another digest."""

    unit: Unit | None
    problem: str = ""


@dataclass(frozen=True)
class TracedCase:
    """A case of the run.

    Attributes:
        digest: as the run recorded it.
        case: the unit with image and label.
        units: teacher -> its unit of this case. Those of validation cases no training reads; they
            are here for pictures.
        left_out: teachers whose units were missing when the run was started.
    """

    name: str
    split: str
    digest: str
    case: Traced
    units: Mapping[str, Traced]
    left_out: frozenset[str] = frozenset()

    @property
    def usable(self) -> dict[str, Unit]:
        """Units that can be read, by teacher."""
        return {name: t.unit for name, t in self.units.items() if t.unit is not None}


@dataclass(frozen=True)
class TracedTeacher:
    """A teacher of the run.

    Attributes:
        digest: as the run recorded it.
        inputs: what that is the digest of; None if neither index nor any unit tells any more.
        indexed: the same as the index has it, for looking up what was measured; or None.
        accepted: organ -> what a receipt notes of a teacher that the gate would have stopped.
    """

    name: str
    digest: str
    inputs: Mapping[str, Any] | None
    indexed: IndexedTeacher | None
    accepted: Mapping[str, Any]

    @property
    def organs(self) -> tuple[str, ...]:
        """Those that it is expert in; empty if nothing tells."""
        return tuple((self.inputs or {}).get("organs", ()))


@dataclass(frozen=True)
class Lineage:
    """All of it."""

    cases: Sequence[TracedCase]
    teachers: Sequence[TracedTeacher]

    def of(self, split: str) -> list[TracedCase]:
        """Cases of a split."""
        return [case for case in self.cases if case.split == split]

    def open(self, case: TracedCase) -> CachedCase | None:
        """The case for reading, with the units that there are; None without its image."""
        if case.case.unit is None:
            return None
        units = case.usable
        experts = {
            organ: sorted(t.name for t in self.teachers if organ in t.organs and t.name in units)
            for organ in dict.fromkeys(o for t in self.teachers for o in t.organs)
        }
        annotated = tuple(case.case.unit.receipt.inputs.get("label_values", {}))
        return CachedCase(case.name, case.split, annotated, case.case.unit, units, experts)


def trace(work: Folder, record: RunRecord) -> Lineage:
    """Opens every unit that the run names; only receipts are read."""
    cases, units = _places(work)
    missing = {t: set(names) for t, names in record.inputs.get("missing_units", {}).items()}
    found = []
    for split, named in ((TRAINING, record.cases), (VALIDATION, record.validation)):
        for name, case_digest in named.items():
            case = _open(cases.get((name, short(case_digest))), case_digest)
            image = None if case.unit is None else case.unit.receipt.inputs.get("image_sha256")
            traced = {
                teacher: _unit(units.get((teacher, short(of), name), ()), of, image)
                for teacher, of in record.teachers.items()
            }
            left_out = frozenset(t for t, names in missing.items() if name in names)
            found.append(TracedCase(name, split, case_digest, case, traced, left_out))
    return Lineage(found, _teachers(work, record, found))


def _places(
    work: Folder,
) -> tuple[dict[tuple[str, str], Place], dict[tuple[str, str, str], list[Place]]]:
    """Places of case units by (case, tag), and of teachers' by (teacher, its tag, case)."""
    cases: dict[tuple[str, str], Place] = {}
    units = defaultdict[tuple[str, str, str], list[Place]](list)
    for place in find_units(work):
        if place.teacher is None:
            cases[place.case_name, place.tag] = place
        else:
            units[place.teacher, place.teacher_tag, place.case_name].append(place)
    return cases, units


def _open(place: Place | None, digest: str | None) -> Traced:
    if place is None:
        return Traced(None, GONE)
    try:
        return Traced(Unit.open(place.path, expect=digest))
    except CacheError as error:
        return Traced(None, error.what)


def _unit(places: Sequence[Place], teacher_digest: str, image: str | None) -> Traced:
    """That of this very image, if the case still tells which; else the only one there is."""
    fitting = [p for p in places if image is None or p.tag == short(image)]
    if len(fitting) > 1:
        return Traced(None, "several in the cache, and the case no longer tells which is meant")
    traced = _open(fitting[0] if fitting else None, None)
    if traced.unit is not None and traced.unit.receipt.inputs["teacher_digest"] != teacher_digest:
        return Traced(None, "of a teacher with another digest")
    return traced


def _teachers(work: Folder, record: RunRecord, cases: Sequence[TracedCase]) -> list[TracedTeacher]:
    files, _ = read_index(work)
    indexed = {file.teacher.digest: file.teacher for file in files if file.teacher is not None}
    found = []
    for name, teacher_digest in record.teachers.items():
        units = [case.usable[name] for case in cases if name in case.usable]
        known = indexed.get(teacher_digest)
        inputs = known.inputs if known else units[0].receipt.teacher_inputs if units else None
        notes = [u.receipt.notes["accepted"] for u in units if "accepted" in u.receipt.notes]
        found.append(TracedTeacher(name, teacher_digest, inputs, known, notes[0] if notes else {}))
    return found


# What the admission gate measured of the run's teachers, and its verdicts by the registry's
# thresholds as they are now.


@dataclass(frozen=True)
class Gate:
    """Verdicts on the run's teachers.

    Attributes:
        scores: rows of teachers against labels; see `score_rows`. With `temperature`.
        elsewhere: rows of teachers where there is no label; see `elsewhere_rows`.
        unknown: teacher -> why there is no verdict on it.
    """

    scores: Sequence[Row]
    elsewhere: Sequence[Row]
    unknown: Mapping[str, str]


def read_gate(work: Folder, registry: Registry, teachers: Sequence[TracedTeacher]) -> Gate:
    """Reads what stage one measured of exactly these teachers."""
    found: list[Evidence] = []
    unknown: dict[str, str] = {}
    for teacher in teachers:
        if teacher.name not in registry.teachers:
            unknown[teacher.name] = "the registry no longer has this teacher, nor its threshold"
        elif teacher.indexed is None:
            unknown[teacher.name] = "the cache's index no longer knows this digest"
        else:
            try:
                found.append(read_evidence(work, registry, teacher.indexed))
            except PipelineError as error:
                unknown[teacher.name] = error.what
    accepted = [teacher.name for teacher in teachers if teacher.accepted]
    measured = {
        (evidence.teacher, organ): seen.calibration
        for evidence in found
        for organ, seen in evidence.organs.items()
    }
    scores = []
    for row in score_rows(registry, found, accepted):
        known = measured[row["teacher"], row["organ"]]
        scores.append({**row, "temperature": None if known is None else known.temperature})
    return Gate(scores, elsewhere_rows(found), unknown)


# Regions and conflicts of the run's cases, by the functions of `pipeline inspect`.


@dataclass(frozen=True)
class OrganRegions:
    """One organ over all cases, in ml: 0, 25, 50, 75 and 100 % quantiles of its region."""

    organ: str
    num_cases: int
    quantiles_ml: tuple[float, ...]
    empty: int
    label_ml: tuple[float, float] | None


@dataclass(frozen=True)
class Regions:
    """What a student of these settings is taught, as numbers: training and validation cases,
    improbable ones first, organs over all of them, pairs of teachers, most conflict first; cases
    that `failed`, and why there are none at all (`absent`)."""

    cases: Sequence[CaseNumbers] = ()
    organs: Sequence[OrganRegions] = ()
    pairs: Sequence[Mapping[str, Any]] = ()
    failed: Mapping[str, str] | None = None
    absent: str = ""

    @property
    def num_improbable(self) -> int:
        """Cases with at least one reason."""
        return sum(bool(case.flags) for case in self.cases)


def measure_regions(record: RunRecord, lineage: Lineage, *, workers: int, log: Log) -> Regions:
    """Measures every case of the run that the cache still has, as its training saw it."""
    if not record.teachers:
        return Regions(
            absent="This run's supervision uses no teacher, so there are no regions: it was "
            "trained from labels alone."
        )
    cases, failed = [], {}
    for traced in lineage.cases:
        case = lineage.open(traced)
        if case is None:
            failed[traced.name] = f"the case itself: {traced.case.problem}"
        elif not case.teachers:
            failed[traced.name] = "no teacher's unit of it can be read"
        else:
            cases.append(case)
    if not cases:
        return Regions(
            failed=failed,
            absent="The cache no longer has any case of this run with a teacher's unit.",
        )
    found = measure_cohort(cases, record.space, record.view, workers=workers, log=log)
    failed |= {name: error.what for name, error in found.failed.items()}
    organs = []
    for organ in record.space.organs:
        sizes = [c.organs[organ].region_ml for c in found.cases if organ in c.organs]
        if sizes:
            usual = found.usual.get(organ)
            ends = tuple(float(q) for q in np.quantile(sizes, (0, 0.25, 0.5, 0.75, 1)))
            empty = sum(ml == 0 for ml in sizes)
            label_ml = None if usual is None else usual.label_ml
            organs.append(OrganRegions(organ, len(sizes), ends, empty, label_ml))
    pairs = [row for row in pair_rows(found.cases) if row["conflict_ml"]]
    return Regions(found.cases, organs, pairs, failed)
