"""Stage one: CT + teachers -> cache.

Per case: CT -> student grid -> cases/; CT -> the teacher's own grid -> sliding window -> log-odds
and features -> student grid -> teachers/. Receipts last; what has one is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from pipeline.cache.index import (
    IndexedCase,
    IndexedTeacher,
    case_path,
    unit_path,
    write_dataset_index,
    write_teacher_index,
)
from pipeline.cache.provenance import teacher_inputs, unit_inputs
from pipeline.cache.schema import StorageConfig, features_spec, log_odds_spec
from pipeline.cache.store import (
    clean_temporaries,
    prepare_work_folder,
    read_receipt,
    write_json,
    write_unit,
)
from pipeline.config import Config, digest, file_sha256
from pipeline.data.files import CaseFiles
from pipeline.data.nifti import read_image
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.errors import CacheError, PipelineError, RegistryError
from pipeline.log import Log
from pipeline.network import pick_device
from pipeline.prepare import centres, organ_voxels, prepare_case
from pipeline.tables import print_tables, region_rows, teacher_rows
from pipeline.teachers.load import load_teacher
from pipeline.teachers.sliding_window import WindowConfig
from pipeline.teachers.teacher import Teacher, organ_log_odds
from pipeline.volume import Volume
from stages.report import StageReport


class CacheTeachersConfig(Config):
    """How stage one computes; see cache_teachers.yaml."""

    splits: tuple[str, ...] = ("train", "validation", "test")
    window: WindowConfig = Field(default_factory=WindowConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    centres_per_organ: int = Field(default=256, ge=1)
    flag_dice_below: float = Field(default=0.5, ge=0, le=1)


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher in memory, and the digest that its units are stored under."""

    teacher: Teacher
    indexed: IndexedTeacher


def run(
    config: CacheTeachersConfig,
    registry: Registry,
    work: Path,
    *,
    log: Log,
    device: str = "auto",
    window_batch: int = 1,
    dry_run: bool = False,
    tables: bool = True,
) -> StageReport:
    """Fills the cache; a second run does nothing.

    Args:
        config: what changes numbers.
        registry: read with its files.
        work: the work folder.
        log: where progress goes.
        device: auto, cpu, cuda, cuda:1.
        window_batch: windows per forward pass.
        dry_run: say what would be done, write nothing.
        tables: also print the tables of regions and of teachers.

    Raises:
        PipelineError: nothing can be done at all: no work folder, a teacher that does not load.
            What concerns one case is in the report instead, and the other cases are done.
    """
    began = time.monotonic()
    report = StageReport("cache-teachers")
    if not dry_run:
        prepare_work_folder(work)
        removed = clean_temporaries(work)
        if removed:
            log.info(f"removed {removed} unfinished units of a run that was killed")
    teachers = {
        name: _load(name, registry, config, device=device, window_batch=window_batch)
        for name in registry.teachers
    }
    files = [c for d in registry.datasets for c in registry.cases(d) if c.split in config.splits]
    log.info(f"{len(files)} cases, {len(teachers)} teachers -> {work}")
    indexed = _prepare_cases(config, registry, work, files, report, log=log, dry_run=dry_run)
    _check_organs(registry, work, indexed, report)
    if not dry_run:
        _write_index(registry, work, indexed, teachers)
    jobs = [(case, source) for case, source in indexed if _usable(case, report)]
    with log.progress("teachers", len(jobs) * len(teachers)) as advance:
        for case, source in jobs:
            native: Volume | None = None
            for name, loaded in teachers.items():
                unit = f"{name} x {case.name}"
                path = unit_path(work, loaded.indexed, case)
                if _exists(path, log):
                    report.skipped.append(unit)
                elif dry_run:
                    report.done.append(unit)
                else:
                    try:
                        native = native or _read_again(source, case)
                        _cache_unit(config, registry, loaded, native, case, path, report)
                        log.event("unit", unit=unit, path=str(path))
                    except PipelineError as error:
                        _fail(report, log, unit, error)
                advance(case.name)
    report.seconds = time.monotonic() - began
    if not dry_run:
        _tell(config, registry, work, teachers, report, show=tables)
    return report


def _load(
    name: str, registry: Registry, config: CacheTeachersConfig, *, device: str, window_batch: int
) -> LoadedTeacher:
    entry = registry.teachers[name]
    weights = registry.resolve(entry.weights)
    teacher = load_teacher(
        name,
        entry,
        weights,
        window=config.window,
        batch_size=window_batch,
        device=pick_device(device),
    )
    inputs = teacher_inputs(
        weights_sha256=file_sha256(weights),
        description=teacher.describe(),
        organs=entry.organs,
        activation=entry.activation,
        spacing_mm=registry.grid.spacing_mm,
        storage=config.storage,
    )
    indexed = IndexedTeacher(name, digest(inputs), tuple(entry.organs), entry.taps, dict(inputs))
    return LoadedTeacher(teacher, indexed)


def _prepare_cases(
    config: CacheTeachersConfig,
    registry: Registry,
    work: Path,
    files: Sequence[CaseFiles],
    report: StageReport,
    *,
    log: Log,
    dry_run: bool,
) -> list[tuple[IndexedCase, CaseFiles]]:
    """Every case is read and put on the student grid before any teacher runs, so that bad input is
    found before GPU time is spent."""
    prepared = []
    with log.progress("cases on the student grid", len(files)) as advance:
        for source in files:
            try:
                indexed, wrote = prepare_case(
                    registry,
                    work,
                    source,
                    spacing_mm=registry.grid.spacing_mm,
                    storage=config.storage,
                    num_centres=config.centres_per_organ,
                    dry_run=dry_run,
                )
                prepared.append((indexed, source))
                (report.skipped if wrote is None else report.done).append(indexed.name)
                report.num_bytes += wrote or 0
            except PipelineError as error:
                _fail(report, log, source.name, error)
            advance(source.name)
    return prepared


def _check_organs(
    registry: Registry,
    work: Path,
    indexed: Sequence[tuple[IndexedCase, CaseFiles]],
    report: StageReport,
) -> None:
    """A dataset whose organ is empty in every case is a wrong label value, or wrong files."""
    for dataset, entry in registry.datasets.items():
        counts = [
            organ_voxels(case_path(work, case))
            for case, _ in indexed
            if case.dataset == dataset and case_path(work, case).exists()
        ]
        for organ, values in entry.annotated.items():
            if counts and not any(count.get(organ, 0) for count in counts):
                report.failed[f"dataset {dataset}"] = RegistryError(
                    f"{organ} is empty in all {len(counts)} cases that could be read.",
                    where=f"{registry.path}, datasets.{dataset}.annotated.{organ}",
                    fix=f"Is {list(values)} really the label value of {organ} in these files?",
                )


def _write_index(
    registry: Registry,
    work: Path,
    indexed: Sequence[tuple[IndexedCase, CaseFiles]],
    teachers: Mapping[str, LoadedTeacher],
) -> None:
    for dataset in registry.datasets:
        cases = [case for case, _ in indexed if case.dataset == dataset]
        write_dataset_index(work, dataset, registry.dataset_key(dataset), cases)
    for name, loaded in teachers.items():
        write_teacher_index(work, registry.teacher_key(name), loaded.indexed)


def _usable(case: IndexedCase, report: StageReport) -> bool:
    return f"dataset {case.dataset}" not in report.failed


def _exists(path: Path, log: Log) -> bool:
    try:
        read_receipt(path)
    except CacheError as error:
        if path.exists():
            log.warn(f"{error} It is made again.")
        return False
    return True


def _read_again(source: CaseFiles, case: IndexedCase) -> Volume:
    image = read_image(source.image)
    if image.sha256 != case.image_sha256:
        raise RegistryError(
            "the image changed while this stage was running.",
            where=f"{source.name}, {source.image}",
            fix="Let nothing write to the dataset, then run the stage again.",
        )
    return image.volume


def _cache_unit(
    config: CacheTeachersConfig,
    registry: Registry,
    loaded: LoadedTeacher,
    native: Volume,
    case: IndexedCase,
    path: Path,
    report: StageReport,
) -> None:
    began = time.monotonic()
    name = loaded.indexed.teacher
    unit = f"{name} x {case.name}"
    entry = registry.teachers[name]
    grid = native.grid.with_spacing(registry.grid.spacing_mm)
    wanted = loaded.teacher.spacing_mm
    image = native
    if wanted is not None:
        image = resample(native, native.grid.with_spacing(wanted), order=1)
    prediction = loaded.teacher.predict(image)
    specs, found = [], {}
    for organ, odds in organ_log_odds(prediction, entry, where=unit).items():
        values = resample(odds, grid, order=1, outside=np.nan).array
        specs.append(log_odds_spec(organ, values, config.storage))
        found[organ] = centres(values > 0, config.centres_per_organ, seed=case.image_sha256)
    taps = {}
    for tap, feature in prediction.features.items():
        stride = _feature_stride(feature, grid.spacing_mm)
        values = resample(feature, grid.coarsen(stride), order=1, outside=np.nan).array
        specs.append(features_spec(tap, values, config.storage))
        taps[tap] = {"stride": list(stride), "channels": int(values.shape[0])}
    receipt = write_unit(
        path,
        specs,
        {
            "case": case.name,
            "teacher": name,
            "grid": grid.to_json(),
            "centres": found,
            "taps": taps,
        },
        unit_inputs(teacher_digest=loaded.indexed.digest, image_sha256=case.image_sha256),
        storage=config.storage,
        seconds=time.monotonic() - began,
    )
    report.done.append(unit)
    report.num_bytes += receipt.num_bytes


def _feature_stride(feature: Volume, spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Student-grid voxels per cell: the power of two nearest to the feature's own cell size, so
    that patches of usual sizes lie on whole cells."""
    ratio = np.array(feature.spacing_mm) / np.array(spacing_mm)
    z, y, x = (int(2 ** max(0, round(float(np.log2(r))))) for r in ratio)
    return z, y, x


def _fail(report: StageReport, log: Log, unit: str, error: PipelineError) -> None:
    report.failed[unit] = error
    log.warn(f"{unit} failed: {error}")


def _tell(
    config: CacheTeachersConfig,
    registry: Registry,
    work: Path,
    teachers: Mapping[str, LoadedTeacher],
    report: StageReport,
    *,
    show: bool,
) -> None:
    regions = region_rows(registry, work)
    scores = teacher_rows(registry, work, flag_below=config.flag_dice_below)
    report.details = {"regions_ml": regions, "teachers": scores}
    write_json(work / "reports" / "cache-teachers.json", report.to_json())
    if show:
        print_tables(regions, scores)
