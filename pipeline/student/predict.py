"""One CT -> label map, probabilities if wanted, and last the JSON that says they are complete."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.store import json_text
from pipeline.config import file_sha256
from pipeline.data.dicom_seg import write_segmentation
from pipeline.data.hounsfield import Doubt, doubts_of
from pipeline.data.nifti import read_image, write_like
from pipeline.data.volume import Grid, Volume
from pipeline.errors import listed
from pipeline.figures import colour_of
from pipeline.folder import Folder, remove, replace_file, temporary_name, writing
from pipeline.student.checkpoint import StudentRecord, load_student
from pipeline.student.ensemble import averaged
from pipeline.student.postprocessing import postprocess
from pipeline.student.predicted import SEG, How, Written, prediction_digest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.student.inference import TellWindows


@dataclass(frozen=True)
class Done:
    """What became of a case.

    Attributes:
        made: it was predicted now (or would be, in a dry run); else it was there.
        doubts: why its image may be no CT in HU.
        note: what the user should hear of it.
        replaced: what another prediction had that is there no more; empty: there was none.
    """

    name: str
    made: bool
    num_bytes: int = 0
    doubts: tuple[Doubt, ...] = ()
    note: str = ""
    replaced: str = ""


@dataclass(frozen=True)
class CasePredictor:
    """A student on a device, ready to predict files into a folder; for a dry run, its record."""

    record: StudentRecord
    network: nn.Module | None
    device: torch.device | None
    output: Path
    how: How

    def predict(
        self, name: str, image: Path, *, tell: TellWindows | None = None, dry_run: bool = False
    ) -> Done:
        """Predicts `output/<name>.nii.gz`, unless it is there from the same student and image.

        Raises:
            ConfigError: what is there is not as it was written, or of another image.
            GeometryError: the image cannot be used.
            WorkFolderError: the disk is full, or cannot be written; what was there stays.
        """
        read, how, stem = read_image(image), self.how, Path(name).name
        # Of a prediction that is there too: whoever runs it again must not take it for a good one.
        doubts = () if name in how.other_units else tuple(doubts_of(read.volume.array))
        content = self._content(name, image, read.sha256)
        files = how.files(stem, self.record.label_space.organs)
        there = Written.read(self.output, name)
        damaged, replaced = list[str](), ""
        if there is not None:
            if not how.by_case:
                there.refuse_other_image(read.sha256, image)
            wanted = [f for f in files if not (f.endswith(SEG) and there.has_no_organ)]
            if there.is_of(content) and there.has(wanted) and not there.damaged(wanted):
                return Done(name, made=False, doubts=doubts)
            damaged = there.damaged(there.files)
            replaced = there.lost(content, files)
        note = read.note
        if damaged:
            note = f"made again, because it cannot be read: {listed(damaged)}. {note}".strip()
        if dry_run:
            return Done(name, made=True, doubts=doubts, note=note, replaced=replaced)
        target = self.output / f"{name}.nii.gz"
        with writing(f"{name}, {target}"), self._scratch(name) as scratch:
            content |= self._make(scratch, files, image, read.volume, tell)
            if content.get("dicom_seg", "") is None:
                files.remove(f"{stem}{SEG}")
                note = f"no organ was found, of which there is no DICOM SEG. {note}".strip()
            num_bytes = sum((scratch / file).stat().st_size for file in files)
            content["files"] = {file: _synced(scratch / file) for file in files}
            if doubts:
                content["warnings"] = [asdict(doubt) for doubt in doubts]
            replace_file(scratch / f"{stem}.json", json_text(content).encode())
            _appear(scratch, target.parent, stem, there, files)
        return Done(name, True, num_bytes, doubts, note, replaced)

    def _content(self, name: str, image: Path, sha256: str) -> dict[str, Any]:
        """What the JSON says of what a case is made from, and how."""
        identity, space, kept = self.how.identity, self.record.label_space, self.how.probabilities
        content: dict[str, Any] = {
            "digest": prediction_digest(identity, sha256), "image": image.name,
            "image_sha256": sha256, "student_sha256": identity["student_sha256"],
            "settings": identity["config"], "organs": dict(space.ids),
        }  # fmt: skip
        if self.how.by_case and name in self.record.trained_on:
            content["trained_on"] = True
        if "averaged_with" in identity:
            content["averaged_with"] = identity["averaged_with"]
        if kept is not None:
            named = kept.files(name, space.organs)
            content["probabilities"] = {"precision": kept.precision, "files": named}
        return content

    def _make(
        self,
        scratch: Path,
        files: Sequence[str],
        image: Path,
        volume: Volume,
        tell: TellWindows | None,
    ) -> dict[str, Any]:
        """All files of a case but its JSON; returns what that says of them beside checksums."""
        from pipeline.student import inference

        assert self.network is not None
        assert self.device is not None
        record, how, said = self.record, self.how, dict[str, Any]()
        space, kept = record.label_space, how.probabilities
        held = self._room(scratch, volume.grid)
        windows = inference.StudentWindows(
            self.network.to(self.device), record.intensity, record.patch, self.device,
            how.overlap, how.window_batch,
        )  # fmt: skip
        classes = np.empty(volume.grid.shape, dtype=np.uint8)
        for rows, logits in windows.rows(volume, record.spacing_mm, tell):
            classes[rows] = inference.running_argmax(iter(logits))
            if held is not None and kept is not None:
                values = inference.organ_probabilities(logits, record.head)
                held[:, rows] = values.astype(kept.precision)
        rules = record.postprocessing if how.postprocessing else {}
        if rules:
            removed = postprocess(classes, space, rules, volume.grid.voxel_ml)
            said["postprocessing"] = {"rules": rules, "removed_ml": removed}
        labels = Volume(space.to_ids(classes), volume.grid)
        write_like(scratch / files[0], labels, image, names={i: o for o, i in space.ids.items()})
        if held is not None and kept is not None:
            parts = [held] if kept.layout == "4d" else list(held)
            for file, part in zip(files[1:], parts, strict=False):  # a DICOM SEG may follow
                write_like(scratch / file, Volume(part, volume.grid), image)
        if how.dicom_seg:
            colours = {organ: colour_of(organ_id) for organ, organ_id in space.ids.items()}
            made = write_segmentation(
                scratch / files[-1], scratch / files[0], image, space.ids, colours
            )
            said["dicom_seg"] = files[-1] if made else None
        return said

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        """A hidden folder on the output's disk, in which all files of a case are made."""
        target = self.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(temporary_name(target.name))
        folder.mkdir()
        try:
            yield folder
        finally:
            remove(folder)

    def _room(self, scratch: Path, grid: Grid) -> npt.NDArray[np.float32] | None:
        """Room for all probabilities on the disk: rows come with all organs, and files want an
        organ with all rows."""
        if self.how.probabilities is None:
            return None
        shape = (len(self.record.organs), *grid.shape)
        path = scratch / "probabilities"
        with path.open("wb") as file:
            try:  # a write to a mapped file that gets no more blocks would end the process (SIGBUS)
                os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        return np.memmap(path, dtype=np.float32, mode="r+", shape=shape)


@dataclass(frozen=True)
class Share:
    """A process's part of a prediction, as it is sent to it: the student is read there."""

    students: Sequence[Folder]
    mirror: bool
    device: torch.device
    output: Path
    how: How

    def __call__(self, item: tuple[str, Path]) -> Done:
        """Predicts a (name, image) pair; students are read once."""
        global _predictor
        if _predictor is None:
            loaded = {student: load_student(student) for student in self.students}
            record, network = averaged(loaded, mirror=self.mirror)
            _predictor = CasePredictor(record, network, self.device, self.output, self.how)
        return _predictor.predict(*item)


_predictor: CasePredictor | None = None


def _synced(path: Path) -> str:
    """The SHA-256 of a file, which is on the disk then."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


def _appear(
    scratch: Path, folder: Path, stem: str, there: Written | None, files: list[str]
) -> None:
    """Puts a case's files in the place of those before. The label map is there last: killed at any
    moment, there is none that its JSON does not tell of, nor one without the rest."""
    if there is not None:
        there.remove()
    (scratch / f"{stem}.json").replace(folder / f"{stem}.json")
    for name in reversed(files):
        (folder / name).parent.mkdir(exist_ok=True)
        (scratch / name).replace(folder / name)
