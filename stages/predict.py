"""NIfTI in, multi-organ label map out, in the geometry of the input, voxel for voxel.

CT -> student grid -> sliding window -> logits, channel by channel back onto the input's grid ->
argmax -> the input's own orientation. A JSON beside each label map names its organs; it is written
last and says which student and which image it came from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from pipeline.cache.store import prepare_work_folder, write_json
from pipeline.config import Config, digest, file_sha256
from pipeline.data.nifti import read_image, write_like
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.errors import ConfigError, PipelineError
from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.network import pick_device
from pipeline.student.checkpoint import StudentRecord, load_student
from pipeline.student.inference import predict_logits, running_argmax
from pipeline.volume import Grid, Volume
from stages.report import StageReport

_SUFFIXES = (".nii.gz", ".nii")


class PredictConfig(Config):
    """How a student is run; see predict.yaml."""

    overlap: float = Field(default=0.5, ge=0, lt=1)


def run(
    config: PredictConfig,
    student: Folder,
    inputs: Mapping[str, Path],
    output: Path,
    *,
    log: Log,
    device: str = "auto",
    window_batch: int = 1,
    dry_run: bool = False,
) -> StageReport:
    """Predicts each input as `output/<name>.nii.gz`; what is there from the same student and image
    is skipped.

    Args:
        config: what changes numbers.
        student: the `student.pt` of a finished run.
        inputs: name (may hold a slash) -> NIfTI of a CT.
        output: folder.
        log: where progress goes.
        device: auto, cpu, cuda, cuda:1.
        window_batch: windows per forward pass.
        dry_run: say what would be done, write nothing.

    Raises:
        CheckpointError: no student there.
        WorkFolderError: the output folder cannot be written.
    """
    began = time.monotonic()
    report = StageReport("predict")
    record, network = load_student(student)
    where = pick_device(device)
    network.to(where)
    if not dry_run:
        prepare_work_folder(output)
    identity = {"student_sha256": file_sha256(student), "config": config.model_dump(mode="json")}
    with log.progress("predict", len(inputs)) as advance:
        for name, path in inputs.items():
            try:
                image = read_image(path)
                made_from = digest({**identity, "image_sha256": image.sha256})
                target, beside = output / f"{name}.nii.gz", output / f"{name}.json"
                _check_not_input(target, path)
                if _is_done(target, beside, made_from):
                    report.skipped.append(name)
                elif dry_run:
                    report.done.append(name)
                else:
                    classes = segment(
                        image.volume, record, network,
                        overlap=config.overlap, window_batch=window_batch, device=where,
                    )  # fmt: skip
                    beside.unlink(missing_ok=True)
                    space = record.label_space
                    names = {organ_id: organ for organ, organ_id in space.ids.items()}
                    labels = Volume(space.to_ids(classes), image.volume.grid)
                    write_like(target, labels, path, names=names)
                    content = {"digest": made_from, "image": path.name, "organs": dict(space.ids)}
                    write_json(beside, content)
                    report.done.append(name)
                    report.num_bytes += target.stat().st_size
                log.detail(f"{name}: {'was there' if name in report.skipped else target}")
            except PipelineError as error:
                report.failed[name] = error
                log.warn(f"{name} failed: {error}")
            advance(name)
    report.seconds = time.monotonic() - began
    return report


def segment(
    image: Volume,
    record: StudentRecord,
    network: nn.Module,
    *,
    overlap: float,
    window_batch: int,
    device: torch.device,
) -> npt.NDArray[np.uint8]:
    """int16 HU (D, H, W) on any grid -> classes 0 .. K on that grid, uint8.

    Logits, not labels, are resampled, so that boundaries are those of the finer grid.
    """
    grid = image.grid.with_spacing(record.spacing_mm)
    logits = predict_logits(
        network,
        resample(image, grid, order=1).array,
        record.intensity,
        record.patch,
        overlap=overlap,
        window_batch=window_batch,
        device=device,
    )
    return running_argmax(_channels(logits, grid, image.grid))


def find_inputs(path: Path) -> dict[str, Path]:
    """One NIfTI, or all of a folder but hidden ones, by name without suffix.

    Raises:
        ConfigError: nothing there, or two files whose label maps would have one name.
    """
    files = sorted(f for f in path.iterdir() if f.name[0] != ".") if path.is_dir() else [path]
    found: dict[str, Path] = {}
    for file in files:
        if not (file.is_file() and file.name.endswith(_SUFFIXES)):
            continue
        if _stem(file) in found:
            raise ConfigError(
                f"{file.name} and {found[_stem(file)].name} would give one label map.",
                where=path,
                fix="Rename one of them, or move it elsewhere.",
            )
        found[_stem(file)] = file
    if not found:
        raise ConfigError(
            "no NIfTI file there.", where=path, fix="Give a .nii.gz file, or a folder of them."
        )
    return found


def chosen_inputs(
    images: Path | None, registry: Registry | None, splits: Sequence[str] | None
) -> dict[str, Path]:
    """The images of a file or folder, or of a registry's cases as `<dataset>/<case>`.

    Args:
        images: a NIfTI file or a folder of them.
        registry: read without its files; instead of `images`.
        splits: of the registry; None: test.

    Raises:
        ConfigError: both or neither are given, or nothing is there.
    """
    if (images is None) == (registry is None) or (images is not None and splits):
        raise ConfigError(
            "it takes images, or a registry and splits of it.",
            where="pipeline predict",
            fix="Give IMAGES alone, or --registry with --split.",
        )
    if registry is None:
        assert images is not None
        return find_inputs(images)
    wanted = splits or ["test"]
    cases = [c for d in registry.datasets for c in registry.cases(d) if c.split in wanted]
    if not cases:
        raise ConfigError(
            f"no case is in {' or '.join(wanted)}.",
            where=registry.path,
            fix="Set `split` in the registry, or give another --split.",
        )
    return {case.name: case.image for case in cases}


def _channels(
    logits: npt.NDArray[np.float32], source: Grid, target: Grid
) -> Iterator[npt.NDArray[np.float32]]:
    for channel in logits:
        yield resample(Volume(channel, source), target, order=1).array


def _check_not_input(target: Path, image: Path) -> None:
    if target.resolve() == image.resolve():
        raise ConfigError(
            "the label map would overwrite this image.", where=image, fix="Name another --output."
        )


def _is_done(target: Path, beside: Path, made_from: str) -> bool:
    try:
        found: str = json.loads(beside.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):
        return False
    return found == made_from and target.exists()


def _stem(path: Path) -> str:
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name
