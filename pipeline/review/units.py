"""What is wrong with one unit: cheaply by its receipt, or deeply by every byte and number in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.places import Place
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import Receipt, read_receipt, verify_object, verify_seal
from pipeline.cache.schema import IMAGE, LABEL
from pipeline.config import short
from pipeline.errors import CacheError, CacheMissing
from pipeline.labels import IGNORE
from pipeline.volume import Grid


def cheap_problems(place: Place, expect: str | None = None) -> list[str]:
    """Receipt, presence, sizes, digest, and whether it lies where it belongs.

    Args:
        place: of the unit.
        expect: the digest that it must have; None takes what its path says.
    """
    try:
        receipt = read_receipt(place.path, expect=expect)
    except CacheMissing:
        return ["it has no receipt"]
    except CacheError as error:
        return [_words(error)]
    return _misplaced(place, receipt)


def deep_problems(place: Place, expect: str | None = None) -> list[str]:
    """`cheap_problems`; if there are none: every checksum, then every array's values.

    An infinite value is a problem; NaN in log-odds and features means "not seen" and is none.
    """
    found = cheap_problems(place, expect)
    if found:
        return found
    unit = Unit.open(place.path)
    found = _says(lambda: verify_seal(unit.path, unit.receipt))
    for name in unit.receipt.objects:
        found += _says(partial(verify_object, unit.path, unit.receipt, name))
    try:
        found += _attributes(place, unit)
        for name in unit.receipt.arrays:
            found += _array(unit, name)
    except CacheError as error:
        found.append(_words(error))
    except (KeyError, TypeError, ValueError) as error:
        found.append(f"its attributes are not those of a unit ({type(error).__name__}: {error})")
    return list(dict.fromkeys(found))


def _words(error: CacheError) -> str:
    return error.what.rstrip(".")


def _misplaced(place: Place, receipt: Receipt) -> list[str]:
    """The digests in its path are those of its inputs."""
    inputs = receipt.inputs
    if place.teacher is None:
        wanted = {"tag": short(receipt.digest)}
    else:
        wanted = {
            "teacher_tag": short(str(inputs.get("teacher_digest", ""))),
            "tag": short(str(inputs.get("image_sha256", ""))),
        }
    return [
        f"it was made as {value}, but lies under {getattr(place, field)}"
        for field, value in wanted.items()
        if getattr(place, field) != value
    ]


def _says(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except CacheError as error:
        return [_words(error)]
    return []


def _attributes(place: Place, unit: Unit) -> list[str]:
    said = [("case", place.case_name), ("teacher", place.teacher)]
    return [
        f"its attribute {name} is {unit.attributes.get(name)!r}, its place says {value!r}"
        for name, value in said
        if value is not None and unit.attributes.get(name) != value
    ]


def _array(unit: Unit, name: str) -> list[str]:
    said = unit.receipt.arrays[name]
    try:
        array = unit.array(name)
        values = unit.read(name)
    except CacheError as error:
        return [_words(error)]
    found = []
    if list(array.shape) != list(said["shape"]):
        found.append(f"{name} has shape {array.shape}, its receipt says {said['shape']}")
    if str(array.dtype) != said["dtype"]:
        found.append(f"{name} is {array.dtype}, its receipt says {said['dtype']}")
    grid = Grid.from_json(unit.attributes["grid"])
    wanted: tuple[int, ...] = grid.shape
    if name.startswith("features/"):
        tap = unit.attributes["taps"][name.removeprefix("features/")]
        wanted = (tap["channels"], *grid.coarsen(tap["stride"]).shape)
    if values.shape != wanted:
        found.append(f"{name} has shape {values.shape}, its grid {wanted}")
    return found + _values(unit, name, values)


def _values(unit: Unit, name: str, values: npt.NDArray[Any]) -> list[str]:
    match name:
        case _ if values.dtype.kind == "f":
            bad = int(np.count_nonzero(np.isinf(values)))
            return [f"{name} holds {bad} infinite values"] if bad else []
        case _ if name == LABEL:
            known = {0, IGNORE, *unit.attributes["organ_ids"].values()}
            strange = sorted({int(v) for v in np.unique(values)} - known)
            return [f"label holds the values {strange}, which are no organ's"] if strange else []
        case _ if name == IMAGE:
            return []
        case _:
            return [f"{name} is {values.dtype}, neither float nor image nor label"]
