"""Reading: arrays of a case, sliced lazily. Opening is cheap; only what is sliced is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from pipeline.cache.objects import open_store
from pipeline.cache.places import unit_name
from pipeline.cache.pool import POOL, ChunkPool, UnreadableChunk
from pipeline.cache.receipt import (
    REMOVE,
    Receipt,
    check_objects,
    read_receipt,
    verify_object,
)
from pipeline.cache.schema import IMAGE, LABEL, features_name, log_odds_name
from pipeline.errors import CacheCorrupt, CacheIncomplete, StoreUnreachable
from pipeline.folder import Folder, is_local, unreachable
from pipeline.patches import Patch
from pipeline.trust import Trust
from pipeline.volume import Grid


@dataclass(frozen=True)
class Unit:
    """One unit, open for reading."""

    path: Folder
    receipt: Receipt

    @classmethod
    def open(cls, path: Folder, *, expect: str | None = None) -> Unit:
        """Opens a unit after the cheap check of its receipt.

        Raises:
            CacheError: see `read_receipt`.
        """
        return cls(path, read_receipt(path, expect=expect))

    @cached_property
    def group(self) -> zarr.Group:
        """The Zarr group, opened on first use, so that a forked or spawned worker opens its own."""
        self._verify("zarr.json")
        folder = self.receipt.group_folder(self.path)
        if is_local(folder):
            return zarr.open_group(folder, mode="r", zarr_format=3)
        try:
            return zarr.open_group(open_store(folder), mode="r", zarr_format=3)
        except OSError as error:
            raise unreachable(self.path, error) from error

    def _verify(self, name: str) -> None:
        verify_object(self.path, self.receipt, self.receipt.object_name(name))

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """Grid, source, sampling centres."""
        attributes: dict[str, Any] = self.group.attrs.asdict()
        return attributes

    @cached_property
    def noted(self) -> Mapping[str, Any]:
        """The attributes without the centres, whose organs are in `held`: little enough to be kept
        for every unit of a training. Read once, through a unit of its own that is not kept open.
        """
        attributes = dict(replace(self).attributes)
        centres = attributes.pop("centres", {})
        return {**attributes, "held": frozenset(o for o, points in centres.items() if points)}

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        return {}

    def array(self, name: str) -> zarr.Array[Any]:
        """A lazy array; slicing it reads the chunks that the slice touches.

        Chunks have checksums of their own; what names their shape has not, so it is held against
        the receipt here.

        Raises:
            CacheCorrupt, CacheIncomplete: its metadata are not what was written.
        """
        if name not in self._arrays:
            self._verify(f"{name}/zarr.json")
            array = self.group[name]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was opened: a worker process opens its own."""
        return {"path": self.path, "receipt": self.receipt}

    def read(self, name: str, patch: Patch | None = None) -> npt.NDArray[Any]:
        """Reads an array, or the part of it inside a patch (last three axes).

        Raises:
            CacheCorrupt: a chunk that fails its checksum.
            CacheIncomplete: a chunk that was lost after the unit was opened.
            StoreUnreachable: an object store does not answer.
        """
        array = self.array(name)
        # A whole array is read once: through the pool it would only push others out.
        pool = ChunkPool() if patch is None else POOL
        d, h, w = array.shape[-3:]
        inside = (patch or Patch((0, 0, 0), (d, h, w))).clip((d, h, w))[0]
        chunks = self.receipt.object_name(f"{name}/c/")
        check = partial(check_objects, self.path, self.receipt, chunks)
        try:
            return pool.read(array, (str(self.path), name), inside, check_fill=check)
        except UnreadableChunk as error:
            if isinstance(error.cause, StoreUnreachable):
                raise error.cause from error
            if isinstance(error.cause, OSError) and not is_local(self.path):
                raise unreachable(self.path, error.cause) from error
            what = f"{unit_name(self.path)}: chunk {error.index} of array {name}"
            if error.lost:
                raise CacheIncomplete(
                    f"{what} is gone since the unit was opened ({error.cause}).",
                    where=self.path,
                    fix="Run `pipeline cache-teachers`, then this again.",
                ) from error
            raise CacheCorrupt(
                f"{what} cannot be decoded ({error.cause}).", where=self.path, fix=REMOVE
            ) from error

    def read_padded(self, name: str, patch: Patch, fill: float) -> npt.NDArray[Any]:
        """Like `read`, with voxels of the patch outside the volume set to `fill`."""
        inside = self.read(name, patch)
        missing = patch.clip(self.array(name).shape[-3:])[1]
        if not any(before or after for before, after in missing):
            return inside
        padding = [(0, 0)] * (inside.ndim - 3) + list(missing)
        return np.pad(inside, padding, constant_values=fill)


@dataclass(frozen=True)
class CachedCase:
    """Image, label, and each teacher's arrays of one case on the student grid.

    Attributes:
        name: `dataset/case`.
        split: train, validation or test.
        annotated: organs that the label speaks of; not those that it shows in its file alone, being
            too small for the grid: nobody knows where they are.
        case: the unit with image and label.
        teachers: teacher -> its unit; teachers without one are absent.
        experts: organ -> teachers that are expert in it.
        trust: (teacher, organ) -> how far it is believed here; those that are absent fully.
    """

    name: str
    split: str
    annotated: tuple[str, ...]
    case: Unit
    teachers: Mapping[str, Unit]
    experts: Mapping[str, Sequence[str]]
    trust: Mapping[tuple[str, str], Trust] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lost = self.case.receipt.swallowed
        object.__setattr__(self, "annotated", tuple(o for o in self.annotated if o not in lost))

    @property
    def grid(self) -> Grid:
        """The student grid of this case."""
        return Grid.from_json(self.case.attributes["grid"])

    def image(self, patch: Patch | None = None, *, fill: float = -1024) -> npt.NDArray[np.int16]:
        """int16 HU (D, H, W)."""
        return self._read(self.case, IMAGE, patch, fill)

    def label(self, patch: Patch | None = None, *, fill: float = 255) -> npt.NDArray[np.uint8]:
        """uint8 organ ids (D, H, W), 255 ignore."""
        return self._read(self.case, LABEL, patch, fill)

    def log_odds(self, teacher: str, organ: str, patch: Patch | None = None) -> npt.NDArray[Any]:
        """float16 (D, H, W), NaN where not seen."""
        return self._read(self.teachers[teacher], log_odds_name(organ), patch, np.nan)

    def features(self, teacher: str, tap: str, cells: Patch | None = None) -> npt.NDArray[Any]:
        """float16 (F, d, h, w), NaN where not seen; the patch is in feature cells."""
        return self._read(self.teachers[teacher], features_name(tap), cells, np.nan)

    def _read(self, unit: Unit, name: str, patch: Patch | None, fill: float) -> npt.NDArray[Any]:
        return unit.read(name) if patch is None else unit.read_padded(name, patch, fill)
