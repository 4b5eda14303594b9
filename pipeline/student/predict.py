"""One CT -> label map, probabilities if wanted, and last the JSON that says they are complete."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.cache.store import json_text
from pipeline.config import digest, file_sha256
from pipeline.data.dicom import decode_pixels, is_series
from pipeline.data.dicom_seg import write_segmentation
from pipeline.data.hounsfield import Doubt, doubts_of
from pipeline.data.nifti import read_file, read_image, write_like
from pipeline.data.volume import Grid, Volume
from pipeline.errors import ConfigError, GeometryError, WorkFolderError, listed
from pipeline.figures import colour_of, itksnap_text, names_in, slicer_text
from pipeline.folder import (
    Folder,
    changed_since,
    json_with,
    refuse_foreign,
    remove,
    replace_file,
    replace_files,
    temporary_name,
    writing,
    written_by_dead,
)
from pipeline.student.checkpoint import StudentRecord, load_student
from pipeline.student.ensemble import averaged
from pipeline.student.images import Inputs
from pipeline.student.postprocessing import postprocess

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.student.inference import FloatArray, TellWindows

ITKSNAP_TABLE = "labels.itksnap.txt"
SLICER_TABLE = "labels.ctbl"
SEG = ".seg.dcm"
_MADE_FROM = {"image": ["image_sha256"], "student": ["student_sha256", "averaged_with"]}


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
        by_case: names are those of a registry's cases: another image of one is its new one.
        postprocessing: parts of organs are removed as the student learnt it.
        dicom_seg: a DICOM SEG is written beside each label map.
    """

    overlap: float
    window_batch: int
    probabilities: Probabilities | None
    identity: Mapping[str, Any]
    other_units: frozenset[str] = frozenset()
    by_case: bool = False
    postprocessing: bool = True
    dicom_seg: bool = False

    def files(self, stem: str, organs: tuple[str, ...]) -> list[str]:
        """Names of a case's files in its folder, the label map's first."""
        kept = self.probabilities
        return [
            f"{stem}.nii.gz",
            *([] if kept is None else kept.files(stem, organs)),
            *([f"{stem}{SEG}"] if self.dicom_seg else []),
        ]


@dataclass(frozen=True)
class Done:
    """What became of a case.

    Attributes:
        name: the case's.
        made: it was predicted now (or would be, in a dry run); else it was there.
        num_bytes: written.
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


class CasePredictor:
    """A student on a device, ready to predict files into a folder; for a dry run, its record."""

    def __init__(
        self,
        record: StudentRecord,
        network: nn.Module | None,
        device: torch.device | None,
        output: Path,
        how: How,
    ) -> None:
        self._record, self._device = record, device
        self._network = None if network is None else network.to(device)
        self._output, self._how = output, how

    def predict(
        self, name: str, image: Path, *, tell: TellWindows | None = None, dry_run: bool = False
    ) -> Done:
        """Predicts `output/<name>.nii.gz`, unless it is there from the same student and image.

        Raises:
            ConfigError: what is there is not as it was written, or of another image.
            GeometryError: the image cannot be used.
            WorkFolderError: the disk is full, or cannot be written; what was there stays.
        """
        read = read_image(image)
        made_from = prediction_digest(self._how.identity, read.sha256)
        # Of a prediction that is there too: whoever runs it again must not take it for a good one.
        known = name in self._how.other_units
        doubts = () if known else tuple(doubts_of(read.volume.array))
        space, kept, stem = self._record.label_space, self._how.probabilities, Path(name).name
        content: dict[str, Any] = {
            "digest": made_from, "image": image.name, "image_sha256": read.sha256,
            "student_sha256": self._how.identity["student_sha256"],
            "settings": self._how.identity["config"], "organs": dict(space.ids),
        }  # fmt: skip
        if self._how.by_case and name in self._record.trained_on:
            content["trained_on"] = True
        if "averaged_with" in self._how.identity:
            content["averaged_with"] = self._how.identity["averaged_with"]
        files = self._how.files(stem, space.organs)
        if kept is not None:
            named = kept.files(name, space.organs)
            content["probabilities"] = {"precision": kept.precision, "files": named}
        there = Written.read(self._output, name)
        damaged, replaced = list[str](), ""
        if there is not None:
            if not self._how.by_case:
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
        target = self._output / f"{name}.nii.gz"
        with writing(f"{name}, {target}"), self._scratch(name) as scratch:
            content |= self._make(scratch, stem, image, read.volume, tell)
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

    def _make(
        self, scratch: Path, stem: str, image: Path, volume: Volume, tell: TellWindows | None
    ) -> dict[str, Any]:
        """All files of a case but its JSON; returns what that says of them beside checksums."""
        from pipeline.student.inference import segment

        assert self._network is not None
        assert self._device is not None
        space, kept, said = self._record.label_space, self._how.probabilities, dict[str, Any]()
        files = self._how.files(stem, space.organs)
        held = self._room(scratch, volume.grid)
        classes = segment(
            volume, self._record, self._network, take=self._keep(held), overlap=self._how.overlap,
            window_batch=self._how.window_batch, device=self._device, tell=tell,
        )  # fmt: skip
        rules = self._record.postprocessing if self._how.postprocessing else {}
        if rules:
            removed = postprocess(classes, space, rules, volume.grid.voxel_ml)
            said["postprocessing"] = {"rules": rules, "removed_ml": removed}
        labels = Volume(space.to_ids(classes), volume.grid)
        write_like(scratch / files[0], labels, image, names={i: o for o, i in space.ids.items()})
        if held is not None and kept is not None:
            parts = [held] if kept.layout == "4d" else list(held)
            for file, part in zip(kept.files(stem, space.organs), parts, strict=True):
                write_like(scratch / file, Volume(part, volume.grid), image)
        if self._how.dicom_seg:
            colours = {organ: colour_of(organ_id) for organ, organ_id in space.ids.items()}
            made = write_segmentation(
                scratch / files[-1], scratch / files[0], image, space.ids, colours
            )
            said["dicom_seg"] = files[-1] if made else None
        return said

    def _keep(
        self, held: npt.NDArray[np.float32] | None
    ) -> Callable[[int, FloatArray], object] | None:
        kept = self._how.probabilities
        if held is None or kept is None:
            return None
        from pipeline.student.inference import organ_probabilities

        def keep(begin: int, logits: FloatArray) -> None:
            values = organ_probabilities(logits, self._record.head)
            if kept.precision == "float16":
                values = values.astype(np.float16).astype(np.float32)
            held[:, begin : begin + values.shape[1]] = values

        return keep

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        """A hidden folder on the output's disk, in which all files of a case are made."""
        target = self._output / name
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
        if self._how.probabilities is None:
            return None
        shape = (len(self._record.organs), *grid.shape)
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


@dataclass(frozen=True)
class Written:
    """What the JSON beside a label map says that `predict` wrote.

    Attributes:
        folder: of the JSON; names of files are relative to it.
        content: of the JSON.
        files: name -> SHA-256; None where it was not kept yet.
    """

    folder: Path
    content: Mapping[str, Any]
    files: Mapping[str, str | None]

    @classmethod
    def read(cls, output: Path, name: str) -> Written | None:
        """None if there is no such JSON, or it is another program's."""
        beside, stem = output / f"{name}.json", Path(name).name
        content = json_with(beside, "digest", "image", "organs")
        if content is None:
            return None
        files = content.get("files")
        if files is None:  # of a version that kept no checksums
            kept = content.get("probabilities")
            named = kept["files"] if isinstance(kept, dict) else []
            own = [file.removeprefix(name.removesuffix(stem)) for file in named]
            files = dict.fromkeys([*own, f"{stem}.nii.gz"])
        own_names = (f.startswith(f"{stem}.") and ".." not in Path(f).parts for f in files)
        if not isinstance(files, dict) or not all(own_names):
            return None
        return cls(beside.parent, content, files)

    @property
    def has_no_organ(self) -> bool:
        """Whether a DICOM SEG was asked for, and there was nothing to put into it."""
        return self.content.get("dicom_seg", "") is None

    def is_of(self, content: Mapping[str, Any]) -> bool:
        """Whether it is from the student, image and settings that this JSON is of, in its ids."""
        wanted = [key for key in ("digest", "organs", "probabilities") if key in content]
        return all(self.content.get(key) == content[key] for key in wanted)

    def refuse_other_image(self, sha256: str, image: Path) -> None:
        """Another image of one name is more likely another patient's than a new version.

        Raises:
            ConfigError: what is there is of another image.
        """
        known = str(self.content.get("image_sha256", sha256))  # once it was not kept
        here = [self.folder / name for name in self.files if (self.folder / name).exists()]
        if known != sha256 and here:
            raise ConfigError(
                f"this is of another image of the same name: of {self.content['image']} whose "
                f"SHA-256 begins with {known[:12]}; that of {image} begins with {sha256[:12]}.",
                where=here[0],
                fix="Name another --output, or give all images in one call by a pattern in quotes, "
                "'cases/*/ct.nii.gz'. If the image is a new version of that one, remove this file.",
            )

    def lost(self, content: Mapping[str, Any], names: Sequence[str]) -> str:
        """Of which other prediction the files are whose place others take; empty if of none.

        Args:
            content: of the new JSON.
            names: of the new files, the label map's first.
        """
        here = [name for name in self.files if (self.folder / name).exists()]
        if not here:
            return ""
        old, more = self.content, ""
        if gone := set(here) - set(names):
            segs = {name for name in gone if name.endswith(SEG)}
            kinds = [*(["probabilities"] if gone - segs else []), *(["DICOM SEG"] if segs else [])]
            more = f", whose {' and '.join(kinds)} {'are' if gone - segs else 'is'} removed"
        if old["digest"] != content["digest"]:
            if "image_sha256" not in old:  # of a version that kept the digest alone
                return f"of another student, image or settings{more}"
            of = [
                what
                for what, keys in _MADE_FROM.items()
                if any(old.get(key) != content.get(key) for key in keys)
            ]
            return f"of another {' and '.join(of)}{more}" if of else f"of other settings{more}"
        if old["organs"] != content["organs"]:
            return f"of other ids{more}"
        same = old.get("probabilities") == content.get("probabilities")
        return "" if same or here == [names[0]] else "with other probabilities"

    def has(self, names: Iterable[str]) -> bool:
        """Whether these files are there."""
        return all((self.folder / name).exists() for name in names)

    def damaged(self, names: Iterable[str]) -> list[str]:
        """Which of its files are there and can be read by nobody, as after a crash.

        Raises:
            ConfigError: one can be read and is not what was written: somebody changed it.
            WorkFolderError: the system does not let one be read.
        """
        found = []
        for name in names:
            path, known = self.folder / name, self.files.get(name)
            if not path.exists():
                continue
            try:
                if file_sha256(path) == known:
                    continue
                decode_pixels(path) if name.endswith(SEG) else read_file(path)
            except OSError as error:
                raise WorkFolderError(
                    f"what is there cannot be read ({error.strerror or error}).",
                    where=path,
                    fix="Check its permissions, or name another --output.",
                ) from error
            except GeometryError:
                found.append(name)
                continue
            if known is not None:
                raise changed_since("predict", path)
        return found

    def remove(self) -> None:
        """The files, before the JSON says that there are others."""
        for name in self.files:
            (self.folder / name).unlink(missing_ok=True)
            if "/" in name:
                with suppress(OSError):  # somebody else's files are in it
                    (self.folder / name).parent.rmdir()


def refuse_targets(inputs: Inputs, output: Path, how: How, organs: tuple[str, ...]) -> None:
    """Nothing that `predict` did not write is replaced, no image or reference whatever it says, and
    no file of one case by another's.

    Args:
        inputs: no place for a prediction, by whatever name they are reached.
        output: the folder.
        how: says what is written.
        organs: of the student.

    Raises:
        ConfigError: it names the files that are in the way, or two cases of one file.
    """
    kept_out = *inputs.images.values(), *inputs.references
    read = {(s.st_dev, s.st_ino) for f in kept_out if (s := _status(f))}
    targets: dict[Path, bool] = {}
    made_of: dict[Path, str] = {}
    if how.dicom_seg:
        _refuse_without_series(inputs.images, output)
    for name in inputs.images:
        there, stem = Written.read(output, name), Path(name).name
        beside = (output / name).with_name(f"{stem}.json")
        targets[beside] = there is not None
        for file in how.files(stem, organs):
            path = beside.parent / file
            if path in made_of:
                raise ConfigError(
                    f"{made_of[path]} and {name} would both be written to this file.",
                    where=path,
                    fix="Rename one of the two images, or predict it into another --output.",
                )
            made_of[path] = name
            targets[path] = there is not None and file in there.files
    for path in targets:
        status = _status(path)
        if status is not None and (status.st_dev, status.st_ino) in read:
            raise ConfigError(
                "the label map would overwrite this image or reference.",
                where=path,
                fix="Name another --output.",
            )
    refuse_foreign("predict", targets.items())


def _refuse_without_series(images: Mapping[str, Path], output: Path) -> None:
    """A DICOM SEG refers to a series, and does not lie in it: there it would be part of it.

    Raises:
        ConfigError: an image is a NIfTI file, or `output` is in a series; or no highdicom.
    """
    others = [str(path) for path in images.values() if not is_series(path)]
    if others:
        raise ConfigError(
            f"a DICOM SEG refers to a DICOM series, and these are none: {listed(others, 3)}.",
            where="--dicom-seg",
            fix="Give the folders or zip files of the series, or leave out --dicom-seg.",
        )
    for path in images.values():
        if output.resolve().is_relative_to(path.resolve()):
            raise ConfigError(
                "the DICOM SEG would become part of this series.",
                where=path,
                fix="Name an --output outside of it.",
            )
    if find_spec("highdicom") is None:
        raise ConfigError(
            "highdicom is not installed, which writes DICOM SEG.",
            where="--dicom-seg",
            fix="Run  pip install 'organ-distill[dicom]', or leave out --dicom-seg.",
        )


def remove_leftovers(inputs: Iterable[str], output: Path) -> None:
    """What killed processes left in the folders of these cases."""
    for folder in {(output / name).parent for name in inputs}:
        for left in folder.glob(".*~*.tmp"):
            if written_by_dead(left.name):
                remove(left)


def write_label_tables(output: Path, record: StudentRecord, *, dry_run: bool = False) -> None:
    """Names and colours of the label maps in a folder, for ITK-SNAP and 3D Slicer. A table that is
    there already and has these names is left as it is, in whatever colours.

    Raises:
        ConfigError: one has other names, and not as this program writes them.
        WorkFolderError: it cannot be written.
    """
    names = {organ_id: organ for organ, organ_id in record.label_space.ids.items()}
    made: dict[str, Callable[[Mapping[int, str]], str]] = {
        ITKSNAP_TABLE: itksnap_text,
        SLICER_TABLE: lambda known: slicer_text(known, SLICER_TABLE),
    }
    stale: dict[Path, bytes] = {}
    is_ours = []
    for file, text in made.items():
        path = output / file
        before, wanted = _text(path), text(names)
        if not before or names_in(before) != names_in(wanted):
            stale[path] = wanted.encode()
            is_ours.append(text(names_in(before)) == before)
    refuse_foreign("predict", zip(stale, is_ours, strict=True))
    if not dry_run:
        with writing(output):
            replace_files(stale)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


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


def student_identity(student: Folder, config: Mapping[str, Any], *more: Folder) -> dict[str, Any]:
    """What the digest of a label map is of, beside its image; `more`: averaged with it.

    Raises:
        ConfigError: one of them is given twice.
    """
    known = {file_sha256(student): student}
    for path in more:
        sha256 = file_sha256(path)
        if sha256 in known:
            raise ConfigError(
                f"this student is given twice, as {known[sha256]} too.",
                where=path,
                fix="Give each once: twice it would count double in the average.",
            )
        known[sha256] = path
    first, *others = known
    of_several = {"averaged_with": others} if others else {}
    return {"student_sha256": first, "config": dict(config), **of_several}


def prediction_digest(identity: Mapping[str, Any], image_sha256: str) -> str:
    """Digest of all that determines a label map; it stands in the JSON beside it.

    Args:
        identity: of student and settings, by `student_identity`.
        image_sha256: of the image's file.
    """
    return digest({**identity, "image_sha256": image_sha256})
