"""A student as files for other programs: a MONAI bundle, TorchScript, torch.export, ONNX.

Each format is a folder of its own, with all that is needed to use it and `export.json`, which says
how far it was from `pipeline predict` on one case. It is written under a temporary name and appears
only if that was within the tolerance.
"""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field

from pipeline.cache.store import prepare_work_folder
from pipeline.config import Config, digest, file_sha256
from pipeline.errors import PipelineError
from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.student.checkpoint import load_student
from pipeline.student.export.description import FORMAT_VERSION
from pipeline.student.export.parity import Parity, Tolerance
from pipeline.student.export.write import (
    FORMATS,
    CheckImage,
    ExportJob,
    Format,
    Wanted,
    check_place,
    is_written,
    open_check_image,
    student_file,
    write_format,
)
from stages.report import StageReport

__all__ = ["FORMATS", "ExportConfig", "Format", "Wanted", "run"]


class ExportConfig(Config):
    """How a student is exported; see export.yaml."""

    name: str | None = Field(
        default=None, min_length=1, description="of a bundle; left out: `student-<digits>`"
    )
    overlap: float = Field(
        default=0.5, ge=0, lt=1, description="fraction that neighbouring windows share"
    )
    opset: int = Field(default=20, ge=18, description="of ONNX")
    tolerance: Tolerance = Field(default_factory=Tolerance)


def run(
    config: ExportConfig,
    student: Folder,
    wanted: Wanted,
    output: Path,
    *,
    log: Log,
    dry_run: bool = False,
) -> StageReport:
    """Writes `output/<format>/` for each format; what is there from the same student, image and
    settings is skipped.

    Raises:
        CheckpointError: no student there.
        ConfigError: nothing to check on, or files are there that are not as `export` wrote them.
        GeometryError: the image cannot be used.
        WorkFolderError: the output folder cannot be written.
    """
    began = time.monotonic()
    report = StageReport("export")
    path = student_file(student)
    record, network = load_student(path)
    identity = {
        "student_sha256": file_sha256(path),
        "config": config.model_dump(mode="json"),
        "format_version": FORMAT_VERSION,
    }
    for form in wanted.formats:
        check_place(output / form)
    if not dry_run:
        prepare_work_folder(output)
    with open_check_image(path, wanted.check_on, wanted.case) as image:
        checked_on = {"name": image.name, "sha256": file_sha256(image.path)}
        what = ExportJob(
            record, network, image.path, config.name or f"student-{record.run_digest[:8]}",
            config.overlap, config.opset, config.tolerance,
        )  # fmt: skip
        for form in dict.fromkeys(wanted.formats):
            made_from = digest({**identity, "format": form, "image": checked_on["sha256"]})
            folder = output / form
            if is_written(folder, made_from):
                report.skipped.append(form)
                continue
            if dry_run:
                report.done.append(form)
                continue
            described = {
                "digest": made_from, "format": form, "checked_on": checked_on,
                "student_sha256": identity["student_sha256"], "overlap": config.overlap,
            }  # fmt: skip
            try:
                found = write_format(folder, form, what, described)
                _log_parity(log, form, image, found)
                report.details[form] = {name: p.to_json() for name, p in found.items()}
                report.done.append(form)
                report.num_bytes += sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            except PipelineError as error:
                report.failed[form] = error
    report.seconds = time.monotonic() - began
    return report


def _log_parity(log: Log, form: Format, image: CheckImage, found: dict[str, Parity]) -> None:
    for what, parity in found.items():
        logits = parity.max_logit_difference
        log.info(
            f"{form}: {what}: {parity.differing_voxels} of {parity.organ_voxels} organ voxels of "
            f"{image.name} differ" + ("" if logits is None else f", logits by up to {logits:.2g}")
        )
    if not any(parity.organ_voxels for parity in found.values()):
        log.warn(
            f"{form}: the student finds no organ in {image.name}, so equal label maps say little. "
            "Check on an image that shows some."
        )
