"""NIfTI files as bytes: packed or not, of version 1 or 2, whole or the header alone.

What their axes mean is for `nifti` to know.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
from isal import igzip

from pipeline.data.files import require_file
from pipeline.errors import GeometryError
from pipeline.label_tables import caret_names, caret_xml

_GZIP_MAGIC = b"\x1f\x8b"
_NIFTI2_HEADER_SIZE = ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
_UNKNOWN_EXTENSION = 0
_COMMENT_EXTENSION = 6


def read_file(path: Path) -> tuple[Any, str]:
    """A NIfTI as nibabel has it, with its voxels in memory, and the SHA-256 of the file's bytes.

    The bytes that were hashed are decoded, so that a file changing meanwhile cannot mix the two.

    Raises:
        GeometryError: it cannot be read, or is no NIfTI.
    """
    require_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GeometryError(
            f"the file cannot be read ({error.strerror}).",
            where=path,
            fix="Check the path and its permissions.",
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    try:
        if path.name.lower().endswith(".gz") or data[:2] == _GZIP_MAGIC:
            # Of the well-kept readers the fastest, and it checks lengths and CRCs (decision 0023).
            data = igzip.decompress(data)
        kind = nib.Nifti2Image if data[:4] in _NIFTI2_HEADER_SIZE else nib.Nifti1Image
        return kind.from_bytes(data), digest
    except Exception as error:  # a damaged header makes nibabel raise almost anything
        raise unreadable(path, error) from error


def read_header(path: Path) -> tuple[Any, Any]:
    """The kind of image that a file holds, and its header; voxels are not read.

    Raises:
        GeometryError: not a readable NIfTI.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            begin = file.read(4)
            packed = path.name.lower().endswith(".gz") or begin[:2] == _GZIP_MAGIC
            file.seek(0)
            with igzip.open(file) if packed else nullcontext(file) as stream:
                first = stream.read(4)
                kind = nib.Nifti2Image if first in _NIFTI2_HEADER_SIZE else nib.Nifti1Image
                # What nibabel keeps of a header is at its beginning; extensions go anyway.
                size = kind.header_class.sizeof_hdr
                return kind, kind.header_class(first + stream.read(size - 4))
    except Exception as error:  # a damaged header makes nibabel raise almost anything
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> GeometryError:
    """What a user is told where nibabel or gzip refuse a file."""
    return GeometryError(
        f"not a readable NIfTI file ({type(error).__name__}: {error}).",
        where=path,
        fix="It may be truncated, or not gzip: fetch or export it again.",
    )


def name_extensions(names: Mapping[int, str]) -> list[Any]:
    """Header extensions that keep the organ of each label value: as TotalSegmentator does, and as
    JSON in a comment.
    """
    text = json.dumps({"labels": {str(k): v for k, v in names.items()}}, sort_keys=True)
    # TotalSegmentator reads the first extension, whatever its code, and gives it this one.
    contents = ((_UNKNOWN_EXTENSION, caret_xml(names)), (_COMMENT_EXTENSION, text))
    return [nib.nifti1.Nifti1Extension(code, _padded(content)) for code, content in contents]


def names_in(header: Any) -> tuple[dict[int, str], ...]:
    """What header extensions call the label values, as `name_extensions` writes them or
    TotalSegmentator does; one mapping for each that says something, without 0."""
    found = []
    for extension in header.extensions:
        content = extension.get_content()
        text = content if isinstance(content, bytes) else str(content).encode()
        names = caret_names(text)
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # somebody's own comment
            names = names or {int(k): str(v) for k, v in json.loads(text)["labels"].items()}
        named = {value: name for value, name in names.items() if value != 0}
        found += [named] if named else []
    return tuple(found)


def _padded(text: str) -> bytes:
    """As long as the header wants it, in blanks: XML readers refuse the zeros that would come."""
    content = text.encode()
    return content + b" " * (-(len(content) + 8) % 16)


def write_file(image: Any, path: Path) -> None:
    """Writes an image of nibabel, `.nii` or `.nii.gz`, atomically; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".nii.gz" if path.name.endswith(".gz") else ".nii"
    temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        nib.save(image, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
