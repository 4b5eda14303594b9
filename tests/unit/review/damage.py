"""Finding units of the tiny cohort, and breaking them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from pipeline.cache.places import find_units
from pipeline.cache.receipt import RECEIPT, Receipt, read_receipt
from pipeline.cache.schema import ArraySpec, StorageConfig
from pipeline.cache.store import Made, write_unit


def unit_at(work: Path, name: str) -> Path:
    """The one unit of that name, as `dataset/case` or `teacher x dataset/case`."""
    (place,) = (place for place in find_units(work) if place.name == name)
    return place.path


def shard(unit: Path, array: str) -> Path:
    """The one shard of an array."""
    (file,) = (path for path in (unit / array / "c").rglob("*") if path.is_file())
    return file


def flip(path: Path, at: int = 40) -> None:
    """Changes one byte; the size stays."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x5A
    path.write_bytes(data)


def lose_receipt(unit: Path) -> None:
    """Leaves arrays that nothing vouches for."""
    (unit / RECEIPT).unlink()


def say(unit: Path, **changes: Any) -> None:
    """Changes what a receipt says, without sealing it anew."""
    data = json.loads((unit / RECEIPT).read_text(encoding="utf-8"))
    (unit / RECEIPT).write_text(json.dumps(data | changes, indent=1), encoding="utf-8")


def rewrite(
    unit: Path,
    *,
    arrays: Callable[[dict[str, npt.NDArray[Any]]], object] = lambda arrays: None,
    attributes: Callable[[dict[str, Any]], object] = lambda attributes: None,
) -> Receipt:
    """Writes a unit again with other contents and a receipt that vouches for them: what a wrong
    writer, not a failing disk, would leave."""
    receipt = read_receipt(unit)
    group = zarr.open_group(unit, mode="r", zarr_format=3)
    values = {name: np.asarray(group[name][...]) for name in receipt.arrays}
    described = group.attrs.asdict()
    arrays(values)
    attributes(described)
    axes = {name: tuple(entry["axes"]) for name, entry in receipt.arrays.items()}
    specs = [ArraySpec(name, values[name], axes[name], 0) for name in values]
    shutil.rmtree(unit)
    return write_unit(
        unit,
        specs,
        described,
        receipt.inputs,
        storage=StorageConfig(),
        made=Made(1, receipt.teacher_inputs),
    )
