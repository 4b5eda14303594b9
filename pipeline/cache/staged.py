"""Copies of units on a node's own disk: the arrays that a job reads, held against the receipts.

Files are copied one by one: written under a temporary name, hashed on the way, and renamed if their
SHA-256 is what the receipt says. So any number of processes may copy one unit at the same moment,
without locks, and a job that reads other arrays adds to what is there.

A copy holds no receipt and lies below a digest of its unit's bytes: nobody takes a folder of copies
for a cache, and caches that differ in a byte share no copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy.typing as npt
import zarr

from pipeline.cache.places import place_of, unit_name
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import REMOVE
from pipeline.config import digest, file_sha256, short
from pipeline.data.patches import Patch
from pipeline.errors import CacheCorrupt, CacheError
from pipeline.folder import Folder, storage_errors, temporary_name
from pipeline.log import Log

T = TypeVar("T")
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Copy:
    """Where a part of a unit has its copy, whether it is there or not.

    Attributes:
        unit: the original.
        root: folder of all copies.
        arrays: names of those that are copied.
    """

    unit: Unit
    root: Path
    arrays: tuple[str, ...]

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
        """Name, as in the receipt -> bytes and SHA-256 of what is copied: the arrays' files, and
        the metadata of the groups above them."""
        receipt = self.unit.receipt
        folders = {folder for name in self.arrays for folder in PurePosixPath(name).parents}
        wanted = tuple(receipt.object_name(f"{name}/") for name in self.arrays)
        groups = {receipt.object_name(str(folder / "zarr.json")) for folder in folders}
        return {
            name: entry
            for name, entry in receipt.objects.items()
            if name in groups or name.startswith(wanted)
        }

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def missing_bytes(self) -> int:
        """Of the files that are not there with their sizes."""
        return sum(int(e["bytes"]) for name, e in self.files.items() if not self._has(name))

    def is_there(self) -> bool:
        """Whether all files are there with their sizes; their bytes are not read."""
        return all(self._has(name) for name in self.files)

    def make(self) -> int:
        """Copies what is not there, or is damaged; returns how many bytes that were.

        Raises:
            CacheCorrupt: the original has other bytes than its receipt says.
            OSError: the original cannot be read, or the copy not written.
        """
        made = 0
        for name, entry in self.files.items():
            target = self.path / name
            if self._has(name) and file_sha256(target) == entry["sha256"]:
                continue
            temporary = self.root / temporary_name(target.name)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if _copied(self.unit.path / name, temporary) != entry["sha256"]:
                    raise CacheCorrupt(
                        f"{name} has other bytes than were written.", where=self.unit.path,
                        fix=REMOVE,
                    )  # fmt: skip
                temporary.replace(target)
            finally:
                with suppress(OSError):
                    temporary.unlink()
            made += int(entry["bytes"])
        return made

    def open(self) -> StagedUnit:
        """The unit as it is read from the copy; look first whether it is there."""
        return StagedUnit(self.path, self.unit.receipt, self.unit)

    def _has(self, name: str) -> bool:
        try:
            return (self.path / name).stat().st_size == int(self.files[name]["bytes"])
        except OSError:
            return False


@dataclass(frozen=True)
class StagedUnit(Unit):
    """A unit that is read from a copy; once that fails, from the original, with a warning.

    Copies lie on disks that others clean up.
    """

    original: Unit

    @cached_property
    def group(self) -> zarr.Group:
        """See `Unit.group`."""
        return self._first(lambda: super(StagedUnit, self).group, lambda: self.original.group)

    def array(self, name: str) -> zarr.Array[Any]:
        """See `Unit.array`."""
        return self._first(
            lambda: super(StagedUnit, self).array(name), lambda: self.original.array(name)
        )

    def read(self, name: str, patch: Patch | None = None) -> npt.NDArray[Any]:
        """See `Unit.read`."""
        return self._first(
            lambda: super(StagedUnit, self).read(name, patch),
            lambda: self.original.read(name, patch),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "original": self.original}

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
