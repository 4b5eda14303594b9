"""One CT -> label map, probabilities if wanted, and last the JSON that says they are complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.cache.store import write_json
from pipeline.config import digest, file_sha256
from pipeline.data.nifti import read_image, write_like
from pipeline.errors import ConfigError
from pipeline.folder import Folder, replace_file
from pipeline.hounsfield import Doubt, doubts_of
from pipeline.label_tables import itksnap_text, slicer_text
from pipeline.student.checkpoint import StudentRecord, load_student
from pipeline.student.inference import TellWindows
from pipeline.student.segmentation import FloatArray, organ_probabilities, segment
from pipeline.volume import Grid, Volume

ITKSNAP_TABLE = "labels.itksnap.txt"
SLICER_TABLE = "labels.ctbl"


@dataclass(frozen=True)
class Probabilities:
    """What is kept of the organs' probabilities.

    Attributes:
        precision: float16 is written as float32 too, NIfTI having no 16-bit floats; values are
            rounded to 11 significant bits, which gzip halves.
        layout: `per-organ`: `<name>.probabilities/<organ>.nii.gz`; `4d`: one file
            `<name>.probabilities.nii.gz`, organs last, in the order of their ids.
    """

    precision: Literal["float16", "float32"]
    layout: Literal["per-organ", "4d"] = "per-organ"

    def files(self, name: str, organs: tuple[str, ...]) -> list[str]:
        """Names of the files of a case, relative to the folder of label maps."""
        if self.layout == "4d":
            return [f"{name}.probabilities.nii.gz"]
        return [f"{name}.probabilities/{organ}.nii.gz" for organ in organs]


@dataclass(frozen=True)
class How:
    """All that a case is predicted with, but the student and the device.

    Attributes:
        overlap: fraction that neighbouring windows share.
        window_batch: windows per forward pass.
        probabilities: None keeps none.
        identity: what is digested with the image.
        other_units: names of inputs that are no CT in HU on purpose.
    """

    overlap: float
    window_batch: int
    probabilities: Probabilities | None
    identity: Mapping[str, Any]
    other_units: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Done:
    """What became of a case.

    Attributes:
        name: the case's.
        made: it was predicted now (or would be, in a dry run); else it was there.
        num_bytes: written.
        doubts: why its image may be no CT in HU.
    """

    name: str
    made: bool
    num_bytes: int = 0
    doubts: tuple[Doubt, ...] = ()


class CasePredictor:
    """A student on a device, ready to predict files into a folder."""

    def __init__(
        self,
        record: StudentRecord,
        network: nn.Module,
        device: torch.device,
        output: Path,
        how: How,
    ) -> None:
        self._record, self._network, self._device = record, network.to(device), device
        self._output, self._how = output, how

    def predict(
        self, name: str, image: Path, *, tell: TellWindows | None = None, dry_run: bool = False
    ) -> Done:
        """Predicts `output/<name>.nii.gz`, unless it is there from the same student and image.

        Raises:
            ConfigError: the label map would overwrite its image.
            GeometryError: the image cannot be used.
        """
        read = read_image(image)
        made_from = prediction_digest(self._how.identity, read.sha256)
        target, beside = self._output / f"{name}.nii.gz", self._output / f"{name}.json"
        if target.resolve() == image.resolve():
            raise ConfigError(
                "the label map would overwrite this image.",
                where=image,
                fix="Name another --output.",
            )
        # Of a prediction that is there too: whoever runs it again must not take it for a good one.
        known = name in self._how.other_units
        doubts = () if known else tuple(doubts_of(read.volume.array))
        kept = self._kept(name)
        wanted: list[str] = [] if kept is None else kept["files"]
        if _is_done(beside, made_from, kept, [target, *(self._output / file for file in wanted)]):
            return Done(name, made=False, doubts=doubts)
        if dry_run:
            return Done(name, made=True, doubts=doubts)
        beside.unlink(missing_ok=True)
        remove_probabilities(self._output, name)
        space = self._record.label_space
        with self._scratch(name, read.volume.grid) as held:
            classes = segment(
                read.volume, self._record, self._network, take=self._keep(held),
                overlap=self._how.overlap, window_batch=self._how.window_batch,
                device=self._device, tell=tell,
            )  # fmt: skip
            if held is not None:
                self._write_probabilities(held, read.volume.grid, image, wanted)
        labels = Volume(space.to_ids(classes), read.volume.grid)
        names = {organ_id: organ for organ, organ_id in space.ids.items()}
        write_like(target, labels, image, names=names)
        content: dict[str, Any] = {
            "digest": made_from, "image": image.name, "organs": dict(space.ids),
        }  # fmt: skip
        if kept is not None:
            content["probabilities"] = kept
        if doubts:
            content["warnings"] = [asdict(doubt) for doubt in doubts]
        write_json(beside, content)
        sizes = [target, *(self._output / file for file in wanted)]
        written = sum(file.stat().st_size for file in sizes)
        return Done(name, made=True, num_bytes=written, doubts=doubts)

    def _kept(self, name: str) -> dict[str, Any] | None:
        """What the JSON of a case says of its probabilities."""
        kept = self._how.probabilities
        if kept is None:
            return None
        files = kept.files(name, self._record.label_space.organs)
        return {"precision": kept.precision, "files": files}

    def _keep(
        self, held: npt.NDArray[np.float32] | None
    ) -> Callable[[int, FloatArray], object] | None:
        kept = self._how.probabilities
        if held is None or kept is None:
            return None

        def keep(begin: int, logits: FloatArray) -> None:
            values = organ_probabilities(logits, self._record.head)
            if kept.precision == "float16":
                values = values.astype(np.float16).astype(np.float32)
            held[:, begin : begin + values.shape[1]] = values

        return keep

    @contextmanager
    def _scratch(self, name: str, grid: Grid) -> Iterator[npt.NDArray[np.float32] | None]:
        """Room for all probabilities on the output's disk: rows come with all organs, and files
        want an organ with all rows."""
        if self._how.probabilities is None:
            yield None
            return
        path = self._output / f"{name}.probabilities"
        path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(self._record.organs), *grid.shape)
        try:
            yield np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
        finally:
            path.unlink(missing_ok=True)

    def _write_probabilities(
        self, held: npt.NDArray[np.float32], grid: Grid, image: Path, wanted: list[str]
    ) -> None:
        kept = self._how.probabilities
        whole = kept is not None and kept.layout == "4d"
        parts = [held] if whole else list(held)
        for file, part in zip(wanted, parts, strict=True):
            write_like(self._output / file, Volume(part, grid), image)


@dataclass(frozen=True)
class Share:
    """A process's part of a prediction, as it is sent to it: the student is read there."""

    student: Folder
    device: torch.device
    output: Path
    how: How

    def __call__(self, items: Any, tell: Callable[[Done], None]) -> None:
        """Predicts (name, image) pairs; the student is read once."""
        global _predictor
        if _predictor is None:
            record, network = load_student(self.student)
            _predictor = CasePredictor(record, network, self.device, self.output, self.how)
        for name, image in items:
            tell(_predictor.predict(name, image))


_predictor: CasePredictor | None = None


def write_label_tables(output: Path, record: StudentRecord) -> None:
    """Names and colours of the label maps in a folder, for ITK-SNAP and 3D Slicer; a table that is
    there already is left as it is."""
    names = {organ_id: organ for organ, organ_id in record.label_space.ids.items()}
    tables = {ITKSNAP_TABLE: itksnap_text(names), SLICER_TABLE: slicer_text(names, SLICER_TABLE)}
    for file, text in tables.items():
        path = output / file
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            replace_file(path, text.encode())


def remove_probabilities(output: Path, name: str) -> None:
    """Those of a case, in either layout, and what a killed process left of them."""
    folder = output / f"{name}.probabilities"
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.with_name(f"{folder.name}.nii.gz").unlink(missing_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        left.unlink()


def _is_done(beside: Path, made_from: str, kept: dict[str, Any] | None, files: list[Path]) -> bool:
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        same = found["digest"] == made_from and kept in (None, found.get("probabilities"))
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return same and all(file.exists() for file in files)


def student_identity(student: Folder, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the digest of a label map is of, beside its image."""
    return {"student_sha256": file_sha256(student), "config": dict(config)}


def prediction_digest(identity: Mapping[str, Any], image_sha256: str) -> str:
    """Digest of all that determines a label map; it stands in the JSON beside it.

    Args:
        identity: of student and settings, by `student_identity`.
        image_sha256: of the image's file.
    """
    return digest({**identity, "image_sha256": image_sha256})
