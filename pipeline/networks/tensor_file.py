"""Tensor files that say whether they are still what was written.

`torch.load` checks no checksum: of 200 files with one flipped bit it read 198, of which 193 gave
other numbers. So a file written here is sealed: its zip comment, which torch and every zip tool
pass over, holds the SHA-256 of all bytes before it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from pipeline.errors import CheckpointError
from pipeline.folder import Folder, replace_file, storage_errors, writing

_END = b"PK\x05\x06"  # of the last record of a zip file: 22 bytes and the comment
_END_BYTES = 22
_MARK = b"organ-distill sha256 "
_SEAL_BYTES = len(_MARK) + 64
_BLOCK = 1 << 20


def save_atomically(path: Path, content: Any) -> None:
    """Sealed, and on the disk: a reader sees the old file or the new.

    Raises:
        WorkFolderError: the disk refuses it; what was there stays.
    """
    import torch

    # In memory first: torch's own writer does not say why a disk refuses it.
    file = BytesIO()
    torch.save(content, file)
    _seal(file)
    with writing(path):
        replace_file(path, file.getvalue())


def load_sealed(path: Folder, *, unsealed: bool = False) -> Any:
    """What `save_atomically` wrote, with tensors on the CPU.

    Args:
        unsealed: also take a file without a seal, as `torch.save` writes it, if the checksums of
            its zip entries are right.

    Raises:
        CheckpointError: absent, changed since it was written, or not a plain tensor file.
    """
    import torch

    def load(file: IO[bytes]) -> Any:
        return torch.load(file, map_location="cpu", weights_only=True)

    return _read(path, unsealed, load)


def read_beside_tensors(path: Folder) -> Any:
    """As `load_sealed`, unsealed files too, without tensors; it imports no torch and runs no code.

    Raises:
        CheckpointError: as `load_sealed`.
    """
    return _read(path, True, _without_tensors)


def _without_tensors(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _Plain(BytesIO(archive.read(name))).load()


class _Plain(pickle.Unpickler):
    """Numbers, text and containers; whatever would be imported or called is left out."""

    def find_class(self, module: str, name: str) -> Any:
        return _LeftOut

    def persistent_load(self, storage: Any) -> None:
        """Bytes of a tensor, which lie in files of their own."""


class _LeftOut(dict[Any, Any]):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()


def _read(path: Folder, unsealed: bool, read: Callable[[IO[bytes]], Any]) -> Any:
    try:
        with storage_errors(path), path.open("rb") as file:
            _check(file, path, unsealed)
            return read(file)
    except FileNotFoundError as error:
        raise CheckpointError(
            "the file does not exist.", where=path, fix="Has `pipeline train-student` finished?"
        ) from error
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        StopIteration,
    ) as error:
        raise CheckpointError(
            f"not a plain tensor file ({type(error).__name__}).",
            where=path,
            fix="It may be truncated, or written by another program.",
        ) from error


def _seal(file: IO[bytes]) -> None:
    file.seek(-_END_BYTES, os.SEEK_END)
    assert file.read(4) == _END, "torch.save ends its files with a zip record without a comment"
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", _SEAL_BYTES))
    size = file.tell()
    mark = _MARK + _sha256(file, size).encode()
    file.seek(size)
    file.write(mark)


def _check(file: IO[bytes], path: Folder, unsealed: bool) -> None:
    """Leaves the file at its beginning."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_BYTES - _SEAL_BYTES))
    tail = file.read()
    end, seal = tail[:_END_BYTES], tail[_END_BYTES:]
    if end[:4] == _END and end[20:] == struct.pack("<H", _SEAL_BYTES) and seal.startswith(_MARK):
        intact = _sha256(file, size - _SEAL_BYTES).encode() == seal[len(_MARK) :]
    else:
        intact = unsealed and _entries_are_right(file)
    file.seek(0)
    if not intact:
        raise CheckpointError(
            "its bytes are not those that were written.",
            where=path,
            fix="A disk or a program truncated or changed it, or another version wrote it.",
        )


def _sha256(file: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        block = file.read(min(_BLOCK, size))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _entries_are_right(file: IO[bytes]) -> bool:
    """Of a zip file without any comment: a damaged seal is a comment, too."""
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - _END_BYTES))
    end = file.read()
    if end[:4] == _END and end[20:] != bytes(2):
        return False
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        return archive.comment == b"" and archive.testzip() is None
