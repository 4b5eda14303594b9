"""One format of a student: written under a temporary name, checked on a case, and only then
given its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import nn

from pipeline.cache.places import Place, find_units
from pipeline.cache.reader import Unit
from pipeline.cache.schema import IMAGE
from pipeline.cache.store import write_json
from pipeline.config import file_sha256, installed
from pipeline.data.nifti import read_image, write_image
from pipeline.data.volume import Grid, Volume
from pipeline.errors import ConfigError
from pipeline.folder import (
    Folder,
    changed_since,
    json_with,
    refuse_foreign,
    temporary_name,
    writing,
    written_by_dead,
)
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.export.bundle import (
    ON_STUDENT_GRID,
    SCRIPTED,
    all_channels,
    compare_bundle,
    write_bundle,
)
from pipeline.student.export.description import bundle_entry, describe, teacher_entry
from pipeline.student.export.formats import FILES, NetworkFormat, open_network, write_network
from pipeline.student.export.parity import Parity, Tolerance, compare_networks

Format = Literal["bundle", "torchscript", "torch-export", "onnx"]
FORMATS: tuple[Format, ...] = ("bundle", "torchscript", "torch-export", "onnx")
RECORD = "export.json"
_PACKAGES = ("torch", "monai", "numpy", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Wanted:
    """Which formats are written, and the CT that they are held against the student on.

    Attributes:
        case: instead: `dataset/case` of the cache; with neither, the cache's first case.
    """

    formats: Sequence[Format]
    check_on: Path | None = None
    case: str | None = None


@dataclass(frozen=True)
class ExportJob:
    """What is written, and what it is checked on.

    Attributes:
        network: the student's, on the CPU, in evaluation mode.
    """

    record: StudentRecord
    network: nn.Module
    image: Path
    name: str
    overlap: float
    opset: int
    tolerance: Tolerance

    def compare(self, exported: nn.Module, file: str) -> Parity:
        """Holds a network that was read back against the student's."""
        image = read_image(self.image).volume
        parity = compare_networks(self.network, exported, image, self.record, overlap=self.overlap)
        tolerance = self.tolerance
        parity.check(file, tolerance.max_differing_fraction, tolerance.max_logit_difference)
        return parity


def write_format(
    folder: Path, form: Format, what: ExportJob, described: Mapping[str, Any]
) -> dict[str, Parity]:
    """Writes `folder` in one go, in place of what was there.

    Args:
        described: further entries of `export.json`.

    Raises:
        ParityError: worse than tolerated; nothing is written, and what was there stays.
        PipelineError: the network cannot be written so.
        WorkFolderError: the disk is full, or cannot be written; what was there stays.
    """
    with writing(folder), _in_one_go(folder) as here:
        if form == "bundle":
            found = _bundle(here, what)
            entry = bundle_entry(what.record, folder=folder.name)
        else:
            found = _network(here, form, what)
            entry = teacher_entry(what.record, weights=f"{folder.name}/{FILES[form]}")
        content: dict[str, Any] = {
            **described,
            "parity": {compared: parity.to_json() for compared, parity in found.items()},
            "tolerance": what.tolerance.model_dump(mode="json"),
            "versions": installed(_PACKAGES),
        }
        if form != "onnx":  # no teacher is of that kind
            content["teacher_entry"] = entry
        files = _files(here)
        content["files"] = {name: path.stat().st_size for name, path in files.items()}
        content["sha256"] = {name: file_sha256(path) for name, path in files.items()}
        write_json(here / RECORD, content)
    return found


def is_written(folder: Path, made_from: str) -> bool:
    """Whether a format is there, complete, from the same student, image and settings."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes: dict[str, int] = found["files"]
        return found["digest"] == made_from and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_place(folder: Path) -> None:
    """Before anything is computed: that `write_format` may replace what is there.

    Raises:
        ConfigError: a file is in the folder that `export` did not write, or that was changed.
    """
    record = json_with(folder / RECORD, "digest", "files") or {}
    sizes, checksums = record.get("files", {}), record.get("sha256", {})
    there = {name: path for name, path in _files(folder).items() if name != RECORD or not record}
    refuse_foreign("export", [(path, name in sizes) for name, path in there.items()])
    for name, path in there.items():
        same = path.stat().st_size == sizes[name]
        if not same or file_sha256(path) != checksums.get(name, file_sha256(path)):
            raise changed_since("export", path)


def _files(folder: Path) -> dict[str, Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in found}


def _network(folder: Path, form: NetworkFormat, what: ExportJob) -> dict[str, Parity]:
    file = FILES[form]
    write_network(folder / file, what.network, what.record.patch, form, opset=what.opset)
    write_json(folder / "student.json", describe(what.record, file=file, overlap=what.overlap))
    return {file: what.compare(open_network(folder / file, form), file)}


def _bundle(folder: Path, what: ExportJob) -> dict[str, Parity]:
    record, network, overlap = what.record, what.network, what.overlap
    write_bundle(folder, record, network, name=what.name, overlap=overlap)
    scripted = all_channels(record, open_network(folder / SCRIPTED, "torchscript"))
    found = {SCRIPTED.as_posix(): what.compare(scripted, SCRIPTED.as_posix())}
    said = what.tolerance
    compared = compare_bundle(folder, what.image, record, network, overlap=overlap)
    for place, parity in compared.items():
        same = place == ON_STUDENT_GRID
        most = said.max_differing_fraction if same else said.bundle_max_differing_fraction
        parity.check(place, most, said.max_logit_difference)
    return found | compared


@contextmanager
def _in_one_go(folder: Path) -> Iterator[Path]:
    """A temporary folder, which takes the place of `folder` at the end of the block."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}~*.tmp"):
        if written_by_dead(left.name):
            shutil.rmtree(left)
    here = folder.with_name(temporary_name(folder.name))
    here.mkdir()
    try:
        yield here
        if folder.exists():
            old = folder.with_name(temporary_name(folder.name))
            folder.replace(old)
            here.replace(folder)
            shutil.rmtree(old)
        else:
            here.replace(folder)
    finally:
        shutil.rmtree(here, ignore_errors=True)


# The case on which an export is held against its student: a NIfTI file, or one from the cache.


@dataclass(frozen=True)
class CheckImage:
    """What is compared on."""

    name: str
    path: Path


def student_file(run: Folder) -> Folder:
    """`student.pt` of a run's folder, or the file itself."""
    return run / "student.pt" if run.is_dir() else run


@contextmanager
def open_check_image(student: Folder, image: Path | None, case: str | None) -> Iterator[CheckImage]:
    """The image for the block.

    Args:
        student: the student's file; the cache is that of the work folder that it lies in.
        case: `dataset/case` of the cache; with neither, the first case of the cache.

    Raises:
        ConfigError: both are given, or there is no such case.
        CacheError: the case is damaged.
    """
    if image is not None and case is not None:
        raise ConfigError("--check-on and --case are given.", fix="Give one of them.")
    if image is not None:
        if not image.is_file():
            raise ConfigError("no such file.", where=image, fix="--check-on takes a NIfTI file.")
        yield CheckImage(image.name, image)
        return
    place = _cached(student, case)
    unit = Unit.open(place.path)
    grid = Grid.from_json(unit.attributes["grid"])
    with TemporaryDirectory(prefix="organ-distill-") as folder:
        # Not compressed: gzip would put the time into it, and the file is digested.
        path = Path(folder) / f"{place.case}.nii"
        write_image(path, Volume(unit.read(IMAGE), grid))
        yield CheckImage(place.case_name, path)


def _cached(student: Folder, case: str | None) -> Place:
    above = (folder for folder in student.absolute().parents if folder.name == "students")
    runs = next(above, None)  # however deep the run lies in it
    work = None if runs is None else runs.parent
    places = [] if work is None else [p for p in find_units(work) if p.teacher is None]
    if case is not None:
        places = [p for p in places if p.case_name == case]
    if not places:
        asked = "no case" if case is None else f"no case {case}"
        raise ConfigError(
            f"{asked} is cached beside this student, and an export is not written unchecked.",
            where=student if work is None else work,
            fix="Give a CT to check it on: --check-on IMAGE.nii.gz.",
        )
    return places[0]
