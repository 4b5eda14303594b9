"""NIfTI in, multi-organ label map out, in the geometry of the input, voxel for voxel.

CT -> student grid -> sliding window -> logits, rows by rows back onto the input's grid -> argmax ->
the input's own orientation. A JSON beside each label map names its organs, the student and the
image it came from, and the checksums of what was written. With several devices, each has a process
of its own, which takes the next case when it is free; files are the same as from one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.cache.store import prepare_work_folder
from pipeline.config import Config
from pipeline.engine.devices import run_on_devices
from pipeline.errors import EngineError, PipelineError, listed
from pipeline.folder import Folder
from pipeline.log import SECONDS_BEFORE_THE_FIRST_LINE, Advance, Log
from pipeline.networks.by_name import pick_device
from pipeline.student.checkpoint import load_student, read_record
from pipeline.student.ensemble import averaged, common_record
from pipeline.student.images import Inputs, chosen_inputs, find_inputs
from pipeline.student.predict import CasePredictor, Done, Share
from pipeline.student.predicted import (
    How,
    Probabilities,
    refuse_targets,
    remove_leftovers,
    student_identity,
    write_label_tables,
)
from stages.report import StageReport

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.student.inference import TellWindows

__all__ = [
    "Inputs", "PredictConfig", "PredictExecution", "chosen_inputs", "find_inputs", "pick_devices",
    "run",
]  # fmt: skip


class PredictConfig(Config):
    """How a student is run; see predict.yaml."""

    overlap: float = Field(
        default=0.5, ge=0, lt=1, description="fraction that neighbouring windows share"
    )
    postprocessing: bool = Field(
        default=True, description="remove the parts of organs that the student learnt to remove"
    )
    mirror: bool = Field(
        default=False, description="average logits over the mirror images seen in training"
    )

    def digested(self) -> dict[str, Any]:
        """What digests are of: a field younger than label maps that are there counts where it is
        not at its default."""
        as_ever = {"postprocessing": True, "mirror": False}
        told = self.model_dump(mode="json")
        return {k: v for k, v in told.items() if k not in as_ever or as_ever[k] != v}


@dataclass(frozen=True)
class PredictExecution:
    """What a prediction runs on, and what it writes.

    Attributes:
        device: auto, cpu, cuda, cuda:1; several with commas, `cuda:0,cuda:1`.
        probabilities: which are written as well; None: none.
        dicom_seg: a DICOM SEG is written as well, of images that are DICOM series.
        dry_run: say what would be done, write nothing.
    """

    device: str = "auto"
    window_batch: int = 1
    probabilities: Probabilities | None = None
    dicom_seg: bool = False
    dry_run: bool = False


def run(
    config: PredictConfig,
    student: Folder | Sequence[Folder],
    inputs: Inputs,
    output: Path,
    execution: PredictExecution | None = None,
    *,
    log: Log,
) -> StageReport:
    """Predicts each input as `output/<name>.nii.gz`; what is there from the same student and image
    is skipped. What is there of another student or other settings is replaced, and said; of another
    image it is an error of that case, unless names are those of a registry's cases. An image that
    cannot be CT in HU is predicted with a warning, which its JSON keeps and the exit code (2).

    Args:
        student: the `student.pt` of a finished run; of several the logits are averaged.
        execution: what it runs on and writes; None: as its defaults say.

    Raises:
        CheckpointError: no student there.
        ConfigError: students that cannot be averaged or mirrored, no such device, files that
            `predict` did not write are in the way, or a DICOM SEG is wanted of a NIfTI file.
        EngineError: the processes of all devices died.
        WorkFolderError: the output folder cannot be written.
    """
    began = time.monotonic()
    report = StageReport("predict")
    images, execution = inputs.images, execution or PredictExecution()
    dry_run = execution.dry_run
    students = list(student) if isinstance(student, Sequence) else [student]
    network: nn.Module | None = None
    if dry_run:
        records = {path: read_record(path) for path in students}
        record, _ = common_record(records, mirror=config.mirror)
    else:
        loaded = {path: load_student(path) for path in students}
        record, network = averaged(loaded, mirror=config.mirror)
    asked = execution.device
    devices = [None] if dry_run and asked == "auto" else pick_devices(asked)
    identity = student_identity(students[0], config.digested(), *students[1:])
    how = How(
        config.overlap, execution.window_batch, execution.probabilities, identity,
        inputs.other_units, inputs.by_case, config.postprocessing, execution.dicom_seg,
    )  # fmt: skip
    refuse_targets(inputs, output, how, record.label_space.organs)
    seen = sorted(set(images) & set(record.trained_on))
    if seen:
        log.remark(
            f"this student was trained on {listed(seen)}: scores of them say nothing about new "
            "patients."
        )
    if not dry_run:
        prepare_work_folder(output)
        remove_leftovers(images, output)
    write_label_tables(output, record, dry_run=dry_run)
    with log.progress("predict", len(images)) as advance:
        hears = _Hears(report, output, log, advance)
        if len(devices) > 1 and len(images) > 1 and not dry_run:
            mirror = config.mirror
            shares = [Share(students, mirror, where, output, how) for where in devices if where]
            _share_out(shares[: len(images)], images, hears)
        else:
            predictor = CasePredictor(record, network, devices[0], output, how)
            for name, path in images.items():
                try:
                    with _windows(log, name) as tell:
                        hears.done(predictor.predict(name, path, tell=tell, dry_run=dry_run))
                except PipelineError as error:
                    hears.failed(name, error)
    hears.say_replaced(len(images))
    report.seconds = time.monotonic() - began
    return report


def _share_out(shares: Sequence[Share], images: Mapping[str, Path], hears: _Hears) -> None:
    try:
        for outcome in run_on_devices(shares, images.items(), name=lambda item: item[0]):
            if outcome.result is not None:
                hears.done(outcome.result)
            elif outcome.error is not None:
                hears.failed(outcome.item[0], outcome.error)
    except EngineError as error:
        hears.not_begun(images, error)


def pick_devices(names: str) -> Sequence[torch.device | None]:
    """One device, or several with commas; the same may be named twice (`cpu,cpu`).

    Raises:
        ConfigError: an unknown device, or one that is not there.
    """
    return [pick_device(name.strip()) for name in names.split(",")]


class _Hears:
    """Takes down what became of each case."""

    def __init__(self, report: StageReport, output: Path, log: Log, advance: Advance) -> None:
        self._report, self._output, self._log, self._advance = report, output, log, advance
        self._replaced: dict[str, str] = {}

    def done(self, done: Done) -> None:
        (self._report.done if done.made else self._report.skipped).append(done.name)
        self._report.num_bytes += done.num_bytes
        target = self._output / f"{done.name}.nii.gz"
        if done.replaced:
            self._replaced[done.name] = done.replaced
        if done.note:
            self._log.warn(f"{done.name}: {done.note}")
        self._log.detail(f"{done.name}: {target if done.made else 'was there'}")
        if done.doubts:
            self._report.warnings[done.name] = [str(doubt) for doubt in done.doubts]
        for doubt in done.doubts:
            self._log.warn(f"{done.name}: {doubt}")
        if any(doubt.severity == "error" for doubt in done.doubts):
            self._report.to_mend.append(done.name)
        self._advance(done.name)

    def failed(self, name: str, error: Exception) -> None:
        self._report.failed[name] = error
        self._log.warn(f"{name} failed: {error}")
        self._advance(name)

    def say_replaced(self, num_cases: int) -> None:
        """Once for all cases; each in the report."""
        for kind in dict.fromkeys(self._replaced.values()):
            names = [name for name, other in self._replaced.items() if other == kind]
            self._log.warn(
                f"replaced: what was there {kind} ({len(names)} of {num_cases} cases: "
                f"{listed(names)})"
            )
        if self._replaced:
            self._report.details["replaced"] = self._replaced

    def not_begun(self, images: Mapping[str, Path], error: EngineError) -> None:
        known = {*self._report.done, *self._report.skipped, *self._report.failed}
        for name in images:
            if name not in known:
                self.failed(name, error)


@contextmanager
def _windows(log: Log, name: str) -> Iterator[TellWindows]:
    """Progress in windows of a case that takes long enough for somebody to wonder."""
    began = time.monotonic()
    with ExitStack() as stack:
        advance: Advance | None = None
        before = 0

        def tell(done: int, total: int) -> None:
            nonlocal advance, before
            if advance is None:
                if time.monotonic() - began < SECONDS_BEFORE_THE_FIRST_LINE:
                    return
                advance = stack.enter_context(log.progress(f"windows of {name}", total, done=done))
            else:
                advance(steps=done - before)
            before = done

        yield tell
