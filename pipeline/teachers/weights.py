"""What of a teacher's weights enters digests."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import digest, file_sha256
from pipeline.errors import TeacherError
from pipeline.teacher_entry import TeacherEntry
from pipeline.teachers.bundle_files import digested_files


def weights_digest(entry: TeacherEntry, path: Path) -> str:
    """SHA-256 of what a teacher is made of, as 64 hexadecimal digits; does not depend on where it
    lies.

    A file: of its bytes. A MONAI bundle: of the names, inside the folder, and the bytes of the files
    that its numbers depend on.

    Raises:
        TeacherError: a file that is not there or cannot be read.
    """
    try:
        if entry.kind != "monai-bundle":
            return file_sha256(path)
        files = digested_files(path)
        return digest({file.relative_to(path).as_posix(): file_sha256(file) for file in files})
    except OSError as error:
        raise TeacherError(
            f"the weights cannot be read ({error.strerror}).",
            where=error.filename or path,
            fix="Correct `weights` in the registry, or fetch them again.",
        ) from error
