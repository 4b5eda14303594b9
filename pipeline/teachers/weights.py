"""Which files are a teacher's weights, and their digest. Nothing here loads a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.config import digest, file_sha256
from pipeline.errors import TeacherError
from pipeline.teacher_entry import TeacherEntry
from pipeline.teachers.bundle_files import digested_files
from pipeline.teachers.nnunet_folder import read_model_folder


def weights_digest(entry: TeacherEntry, path: Path) -> str:
    """A digest of the bytes that a teacher is loaded from, wherever they lie.

    Weights in one file: the SHA-256 of its bytes. Weights in a folder: the digest of the SHA-256 of
    every file in it that the entry uses, by name relative to the folder.

    Args:
        entry: says of which kind the teacher is, and which of a folder's files it uses.
        path: its weights.

    Returns:
        64 hexadecimal digits.

    Raises:
        TeacherError: a file that is not there, or cannot be read.
    """
    try:
        match entry.kind:
            case "nnunet":
                files = _nnunet_files(entry, path)
            case "monai-bundle":
                files = digested_files(path)
            case _:
                return file_sha256(path)
        return digest({name: file_sha256(file) for name, file in files.items()})
    except OSError as error:
        raise TeacherError(
            f"the weights cannot be read ({error.strerror}).",
            where=error.filename or path,
            fix="Correct `weights` in the registry; paths are relative to the registry's folder.",
        ) from error


def _nnunet_files(entry: TeacherEntry, path: Path) -> Mapping[str, Path]:
    folder = read_model_folder(path, entry)
    return {
        "plans.json": folder.path / "plans.json",
        "dataset.json": folder.path / "dataset.json",
        **{f"fold_{fold}": checkpoint for fold, checkpoint in folder.checkpoints.items()},
    }
