"""Copies of units on a node's own disk: the arrays that a job reads, held against the receipts.

Files are copied one by one: written under a temporary name, hashed on the way, and renamed if their
SHA-256 is what the receipt says. So any number of processes may copy one unit at the same moment,
without locks, and a job that reads other arrays adds to what is there.

Decoded copies hold each array as plain numbers in one file, followed by their SHA-256, beside the
group's metadata. They are read memory-mapped: all processes of a node share what the system keeps
of them in memory, and nothing is decoded again.

A copy holds no receipt and lies below a digest of its unit's bytes: nobody takes a folder of copies
for a cache, and caches that differ in a byte share no copy.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.cache.places import place_of, unit_name
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import REMOVE
from pipeline.cache.shards import StoredArray
from pipeline.config import digest, file_sha256, short
from pipeline.data.patches import Patch
from pipeline.errors import CacheCorrupt, CacheError
from pipeline.folder import Folder, storage_errors, temporary_name
from pipeline.log import Log

T = TypeVar("T")
_PIECE_BYTES = 1 << 22
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Copy:
    """Where a part of a unit has its copy, whether it is there or not.

    Attributes:
        unit: the original.
        root: folder of all copies.
    """

    unit: Unit
    root: Path
    arrays: tuple[str, ...]
    decoded: bool = False

    @cached_property
    def name(self) -> str:
        """Of the copy, below `root`; laid out as in a work folder, so that messages can name the
        unit."""
        names = str(self.unit.path).split("/")
        place = place_of(self.unit.path)
        depth = 1 if place is None else 3 if place.teacher is None else 4
        return "/".join([short(digest(self.unit.receipt.objects)), *names[-depth:]])

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.root / self.name

    @cached_property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Name, as in the receipt -> bytes and SHA-256 of what is copied as it is: the arrays'
        files, unless they are decoded, and the metadata of the arrays and of the groups above."""
        receipt = self.unit.receipt
        folders = {folder for name in self.arrays for folder in PurePosixPath(name).parents}
        inside = "zarr.json" if self.decoded else ""
        wanted = tuple(receipt.object_name(f"{name}/{inside}") for name in self.arrays)
        groups = {receipt.object_name(str(folder / "zarr.json")) for folder in folders}
        return {
            name: entry
            for name, entry in receipt.objects.items()
            if name in groups or name.startswith(wanted)
        }

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """File below its folder -> bytes."""
        sizes = {name: int(entry["bytes"]) for name, entry in self.files.items()}
        for name in self.arrays if self.decoded else ():
            array = self.unit.receipt.arrays[name]
            itemsize = np.dtype(array["dtype"]).itemsize
            sizes[_raw(name)] = math.prod(array["shape"]) * itemsize + _DIGEST_BYTES
        return sizes

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(self.sizes.values())

    def missing_bytes(self) -> int:
        """Of the files that are not there with their sizes."""
        return sum(size for name, size in self.sizes.items() if not self._has(name))

    def is_there(self) -> bool:
        """Whether all files are there with their sizes; their bytes are not read."""
        return all(self._has(name) for name in self.sizes)

    def make(self) -> int:
        """Copies what is not there, or is damaged; returns how many bytes that were.

        Raises:
            CacheCorrupt: the original has other bytes than its receipt says.
            OSError: the original cannot be read, or the copy not written.
        """
        made = 0
        for name, entry in self.files.items():
            if self._has(name) and file_sha256(self.path / name) == entry["sha256"]:
                continue
            with self._written(name) as temporary:
                if _copied(self.unit.path / name, temporary) != entry["sha256"]:
                    raise CacheCorrupt(
                        f"{name} has other bytes than were written.", where=self.unit.path,
                        fix=REMOVE,
                    )  # fmt: skip
            made += int(entry["bytes"])
        for name in self.arrays if self.decoded else ():
            raw = _raw(name)
            if self._has(raw) and _is_whole(self.path / raw):
                continue
            with self._written(raw) as temporary:
                self._decode(name, temporary)
            made += self.sizes[raw]
        return made

    def open(self) -> StagedUnit:
        """The unit as it is read from the copy; look first whether it is there."""
        stamps = {n: _stamp(self.path / _raw(n)) for n in (self.arrays if self.decoded else ())}
        return StagedUnit(self.path, self.unit.receipt, self.unit, stamps)

    def _has(self, name: str) -> bool:
        try:
            return (self.path / name).stat().st_size == self.sizes[name]
        except OSError:
            return False

    @contextmanager
    def _written(self, name: str) -> Iterator[Path]:
        """A temporary file, which becomes the one of this name if all goes well."""
        target = self.path / name
        temporary = self.root / temporary_name(target.name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(target)
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _decode(self, name: str, target: Path) -> None:
        """From a copy as it is stored, held against the receipt, that is dropped at once."""
        stored = self.root / temporary_name("stored")
        try:
            copy = Copy(self.unit, stored, (name,))
            copy.make()
            values = Unit(copy.path, self.unit.receipt).read(name)
        finally:
            shutil.rmtree(stored, ignore_errors=True)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        with target.open("wb") as writer:
            writer.write(data)
            writer.write(hashlib.sha256(data).digest())


@dataclass(frozen=True)
class StagedUnit(Unit):
    """A unit that is read from a copy; once that fails, from the original, with a warning.

    Copies lie on disks that others clean up.

    Attributes:
        stamps: array -> size and time of change of its decoded file; empty if none is decoded.
    """

    original: Unit
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """See `Unit.attributes`."""
        return self._first(
            lambda: super(StagedUnit, self).attributes, lambda: self.original.attributes
        )

    def array(self, name: str) -> StoredArray:
        """See `Unit.array`."""
        return self._first(
            lambda: super(StagedUnit, self).array(name), lambda: self.original.array(name)
        )

    def read(self, name: str, patch: Patch | None = None) -> npt.NDArray[Any]:
        """See `Unit.read`."""
        return self._first(
            lambda: (
                self._decoded(name, patch)
                if name in self.stamps
                else super(StagedUnit, self).read(name, patch)
            ),
            lambda: self.original.read(name, patch),
        )

    def _decoded(self, name: str, patch: Patch | None) -> npt.NDArray[Any]:
        """The file is looked at each time: who changes it below its mapping changes numbers, and
        who shortens it ends this process."""
        path, stamp = Path(str(self.path), _raw(name)), self.stamps[name]
        array = self.receipt.arrays[name]
        if _stamp(path) != stamp:
            raise CacheCorrupt(
                f"{_raw(name)} was changed or removed.", where=path, fix="Remove the copies."
            )
        values = _mapped(path, stamp, array["dtype"], tuple(array["shape"]))
        if patch is None:
            return np.array(values)
        box: Any = (..., *patch.clip(values.shape[-3:])[0])
        return np.array(values[box])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "original": self.original, "stamps": self.stamps}

    def _first(self, ours: Callable[[], T], theirs: Callable[[], T]) -> T:
        """In a loader process, which has no log, too."""
        if "_lost" not in self.__dict__:
            try:
                return ours()
            except (CacheError, OSError) as error:
                self.__dict__["_lost"] = True
                Log().warn(
                    f"{unit_name(self.path)}: its copy cannot be read ({error}). It is read from "
                    f"{self.original.path} instead."
                )
        return theirs()


def _raw(name: str) -> str:
    """The file of a decoded array."""
    return f"{name}/decoded"


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change; zeros of a file that is gone."""
    with suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return 0, 0


# Of the 65,530 mappings that Linux allows a process, each an array of a case.
@lru_cache(maxsize=10_000)
def _mapped(
    path: Path, stamp: tuple[int, int], dtype: str, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    return np.memmap(path, dtype, "r", 0, shape)


def _is_whole(path: Path) -> bool:
    """Whether a decoded file ends with the SHA-256 of what is before."""
    found, left = hashlib.sha256(), path.stat().st_size - _DIGEST_BYTES
    with path.open("rb") as reader:
        while piece := reader.read(min(_PIECE_BYTES, left)):
            found.update(piece)
            left -= len(piece)
        return reader.read() == found.digest()


def _copied(source: Folder, target: Path) -> str:
    """Copies a file in pieces; returns the SHA-256 of what was read.

    It is not forced to the disk: whoever uses it after a crash reads every byte first.
    """
    found = hashlib.sha256()
    with storage_errors(source), source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(_PIECE_BYTES):
            found.update(piece)
            writer.write(piece)
    return found.hexdigest()
