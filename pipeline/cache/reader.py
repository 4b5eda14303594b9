"""Reading: arrays of a case, sliced lazily, through a pool of decoded chunks. Opening is cheap;
only what is sliced is read.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.cache.places import unit_name
from pipeline.cache.receipt import REMOVE, Receipt, read_object, read_receipt
from pipeline.cache.schema import IMAGE, LABEL, features_name, log_odds_name
from pipeline.cache.shards import StoredArray, shard_name
from pipeline.config import Config
from pipeline.data.patches import Index3, Patch, Slices3
from pipeline.data.volume import Grid
from pipeline.errors import CacheCorrupt, CacheIncomplete
from pipeline.folder import Folder, is_local, unreachable

# A bounded pool of decoded chunks, one per process: decoding costs more than any reading.
#
# Measured (docs/decisions/0004): a patch of image, label and several log-odds decodes whole chunks
# again and again while training stays on few cases; keeping them pays more than any codec.

_Chunk = npt.NDArray[Any]


class UnreadableChunk(Exception):
    """A chunk that cannot be read or decoded; `index` counts chunks along each axis."""

    def __init__(self, index: Index3, cause: Exception) -> None:
        super().__init__(index, cause)
        self.index, self.cause = index, cause


class ChunkPool:
    """Least recently used chunks go first. A pool of 0 bytes keeps nothing."""

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self._chunks: OrderedDict[tuple[Any, ...], _Chunk] = OrderedDict()
        self._bytes = 0

    def resize(self, max_bytes: int) -> None:
        """Sets the limit and drops what is over it."""
        self.max_bytes = max_bytes
        self._shrink()

    def read(self, array: StoredArray, key: tuple[str, ...], inside: Slices3) -> _Chunk:
        """`array[..., *inside]`, chunk by chunk through the pool.

        Args:
            array: its leading axes are in one chunk.
            key: names the array in this process: the unit's path and the array's name.
            inside: within the array's shape.

        Raises:
            UnreadableChunk: one that cannot be read or decoded.
        """
        sizes = array.chunks[-3:]
        lead = array.shape[:-3]
        out = np.empty((*lead, *(s.stop - s.start for s in inside)), dtype=array.dtype)
        ranges = [
            range(s.start // n, -(-s.stop // n)) if s.stop > s.start else range(0)
            for s, n in zip(inside, sizes, strict=True)
        ]
        for z, y, x in product(*ranges):
            index = z, y, x
            origin = [i * n for i, n in zip(index, sizes, strict=True)]
            ends = [min(o + n, m) for o, n, m in zip(origin, sizes, array.shape[-3:], strict=True)]
            chunk = self._get((*key, index), partial(_load, array, index))
            low = [max(o, s.start) for o, s in zip(origin, inside, strict=True)]
            high = [min(e, s.stop) for e, s in zip(ends, inside, strict=True)]
            there = tuple(
                slice(a - s.start, b - s.start) for a, b, s in zip(low, high, inside, strict=True)
            )
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
            _at(out, there)[...] = _at(chunk, here)
        return out

    def _get(self, key: tuple[Any, ...], load: Callable[[], _Chunk]) -> _Chunk:
        found = self._chunks.get(key)
        if found is not None:
            self._chunks.move_to_end(key)
            return found
        chunk = load()
        if chunk.nbytes <= self.max_bytes:
            self._chunks[key] = chunk
            self._bytes += chunk.nbytes
            self._shrink()
        return chunk

    def _shrink(self) -> None:
        while self._bytes > self.max_bytes and self._chunks:
            _, dropped = self._chunks.popitem(last=False)
            self._bytes -= dropped.nbytes


# What codecs raise on bytes that they cannot decode, and disks and stores on those they cannot get.
_DECODING = (RuntimeError, ValueError, OSError, MemoryError, OverflowError)


def _load(array: StoredArray, index: Index3) -> _Chunk:
    try:
        return array.chunk(index)
    except _DECODING as error:
        raise UnreadableChunk(index, error) from error


def _at(chunk: _Chunk, box: tuple[slice, ...]) -> _Chunk:
    index: Any = (..., *box)
    view: _Chunk = chunk[index]
    return view


POOL = ChunkPool()


# How far a teacher is relied on: the settings, and the outcome for one organ in one case.


class ReliabilityConfig(Config):
    """When the word of a teacher counts.

    A word that does not count is as if the teacher had not seen the voxel: it is ignored there.
    """

    least_found: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description='"not here" counts if the teacher finds this share of its organ',
    )
    least_right: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description='"here" counts if this share of what it claims is the organ',
    )
    plausible: bool = Field(
        default=True, description="a size that no label shows silences one side in that case"
    )
    agree_after: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of the training from which on a word counts at a voxel only where the "
        "student says the same; null: never",
    )
    gone: ClassVar[Mapping[str, str]] = {
        "doubt": "agree_after compares both words of a teacher with the student's"
    }


class Trust(NamedTuple):
    """Whether a teacher's word counts; the two sides fail independently of each other.

    Attributes:
        here: "the organ is here" (log-odds above 0).
        not_here: "it is not here" (all else).
    """

    here: bool = True
    not_here: bool = True
    why: str = ""

    @property
    def ignored(self) -> bool:
        """Whether nothing that it says counts: as if it had no unit of the case."""
        return not (self.here or self.not_here)


FULL = Trust()


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

    def _metadata(self, name: str) -> dict[str, Any]:
        data = read_object(self.path, self.receipt, self.receipt.object_name(name))
        metadata: dict[str, Any] = json.loads(data)
        return metadata

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """Grid, source, sampling centres."""
        attributes: dict[str, Any] = self._metadata("zarr.json")["attributes"]
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
    def _arrays(self) -> dict[str, StoredArray]:
        return {}

    def array(self, name: str) -> StoredArray:
        """An array of which nothing is read yet.

        Chunks have checksums of their own; what names their shape has not, so it is held against
        the receipt here.

        Raises:
            CacheCorrupt, CacheIncomplete: its metadata are not what was written.
        """
        if name not in self._arrays:
            metadata = self._metadata(f"{name}/zarr.json")
            shard = self.receipt.object_name(shard_name(name, len(metadata["shape"])))
            num_bytes = int(self.receipt.objects.get(shard, {"bytes": 0})["bytes"])
            self._arrays[name] = StoredArray.of(metadata, self.path / shard, num_bytes)
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
        try:
            return pool.read(array, (str(self.path), name), inside)
        except UnreadableChunk as error:
            what = f"{unit_name(self.path)}: chunk {error.index} of array {name}"
            if isinstance(error.cause, FileNotFoundError):
                raise CacheIncomplete(
                    f"{what} is gone since the unit was opened ({error.cause}).",
                    where=self.path,
                    fix="Run `pipeline cache-teachers`, then this again.",
                ) from error
            if isinstance(error.cause, OSError) and not is_local(self.path):
                raise unreachable(self.path, error.cause) from error
            raise CacheCorrupt(
                f"{what} cannot be decoded ({error.cause}).", where=self.path, fix=REMOVE
            ) from error

    def read_padded(self, name: str, patch: Patch, fill: float) -> npt.NDArray[Any]:
        """Like `read`, with voxels of the patch outside the volume set to `fill`."""
        inside = self.read(name, patch)
        missing = patch.clip(self.receipt.arrays[name]["shape"][-3:])[1]
        if not any(before or after for before, after in missing):
            return inside
        padding = [(0, 0)] * (inside.ndim - 3) + list(missing)
        return np.pad(inside, padding, constant_values=fill)


@dataclass(frozen=True)
class CachedCase:
    """Image, label, and each teacher's arrays of one case on the student grid.

    Attributes:
        name: `dataset/case`.
        annotated: organs that the label speaks of; not those that it shows in its file alone, being
            too small for the grid: nobody knows where they are.
        case: the unit with image and label.
        experts: organ -> teachers that are expert in it.
        trust: (teacher, organ) -> what of it counts here; those that are absent fully.
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

    def organ_ml(self, organ: str) -> float:
        """How large an organ is in the label, as stage one noted it; 0 without any."""
        noted = self.case.noted
        voxels: int = noted.get("organ_voxels", {}).get(organ, 0)
        return voxels * Grid.from_json(noted["grid"]).voxel_ml

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
