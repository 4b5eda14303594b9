"""The files that `predict` writes of each image, and those before them: of another prediction they
are replaced, and it is said; anybody else's are left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pipeline.config import digest, file_sha256
from pipeline.data.dicom import decode_pixels, is_series
from pipeline.data.nifti import read_file
from pipeline.errors import ConfigError, GeometryError, WorkFolderError, listed
from pipeline.figures import itksnap_text, names_in, slicer_text
from pipeline.folder import (
    Folder,
    changed_since,
    json_with,
    refuse_foreign,
    remove,
    replace_files,
    writing,
    written_by_dead,
)
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.images import Inputs

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
        identity: what is digested with the image.
        other_units: names of inputs that are no CT in HU on purpose.
        by_case: names are those of a registry's cases: another image of one is its new one.
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
class Written:
    """What the JSON beside a label map says that `predict` wrote.

    Attributes:
        folder: of the JSON; names of files are relative to it.
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
    """A DICOM SEG refers to a series, and does not lie in it: there it would be part of it."""
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
    """Digest of all that determines a label map; it stands in the JSON beside it."""
    return digest({**identity, "image_sha256": image_sha256})
