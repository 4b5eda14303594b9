"""The case on which an export is held against its student: a NIfTI file, or one from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.cache.places import Place, find_units
from pipeline.cache.reader import Unit
from pipeline.cache.schema import IMAGE
from pipeline.data.nifti import write_image
from pipeline.errors import ConfigError
from pipeline.folder import Folder
from pipeline.volume import Grid, Volume


@dataclass(frozen=True)
class CheckImage:
    """What is compared on.

    Attributes:
        name: for people.
        path: NIfTI.
    """

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
        image: a NIfTI file.
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
    work = _work_folder(student)
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


def _work_folder(student: Folder) -> Folder | None:
    """Above `students/`, however deep the run lies in it."""
    for folder in student.absolute().parents:
        if folder.name == "students":
            return folder.parent
    return None
