"""Single flipped bytes and truncations over all that a unit consists of, and over the index.

Each is tried on one file of a filled cache, looked for by the deep check, met by reading whole
arrays, a random patch and the attributes as stage two does, and taken back. Reading either raises a
CacheError or gives exactly what was written. Lost: a wrong number, another error, or no finding.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.cache.places import Place, find_units
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import read_receipt
from pipeline.cache.staged import Copy
from pipeline.consensus.cohort import open_cohort
from pipeline.data.patches import Patch
from pipeline.data.registry import load_registry
from pipeline.errors import CacheError
from pipeline.log import Log
from pipeline.review.verify import deep_problems, repair, verify
from tests.faults.ledger import LEDGER, how_many
from tests.faults.small import content, files_of, flip, run_stage, truncate
from tests.tiny import work_of

KINDS = {"array bytes": "c/**/*", "array metadata": "*/**/zarr.json", "attributes": "zarr.json",
         "receipt": "receipt.json"}  # fmt: skip
Damage = Callable[[Path, random.Random], bytes]


@dataclass(frozen=True)
class Truth:
    """What a unit says before any damage."""

    place: Place
    digest: str
    attributes: Any
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def of(cls, place: Place) -> Truth:
        """Reads everything."""
        unit = Unit.open(place.path)
        arrays = {name: unit.read(name) for name in unit.receipt.arrays}
        return cls(place, unit.receipt.digest, unit.attributes, arrays)


@pytest.mark.parametrize(
    ("what", "damage", "tries"),
    [("flipped byte", flip, (100, 1000)), ("truncation", truncate, (20, 100))],
)
def test_damage_is_found_and_never_read_as_a_number(
    small_cached: Path, what: str, damage: Damage, tries: tuple[int, int]
) -> None:
    rng = random.Random(what)
    truths = [Truth.of(place) for place in find_units(work_of(small_cached))]
    for number in range(how_many(*tries)):
        kind = list(KINDS)[number % len(KINDS)]
        truth = rng.choice(truths)
        file = rng.choice(_files(truth.place.path, kind))
        before = damage(file, rng)
        refused = _read(truth, rng)
        found = deep_problems(truth.place, truth.digest)
        LEDGER.add(f"{what}, {kind}", detected=bool(found), lost=not found)
        if refused:
            LEDGER.add(f"{what}, {kind}: refused when read, else right", lost=0)
        else:
            LEDGER.add(f"{what}, {kind}: refused when read, else right", detected=0)
        where = f"{file}, {len(before)} bytes, trial {number}"
        assert found, where
        # Not all is parsed by a reader: white space in the receipt, the groups between.
        assert refused or kind in ("receipt", "array metadata"), where
        file.write_bytes(before)
        assert deep_problems(truth.place, truth.digest) == []


@pytest.mark.parametrize(("damage", "tries"), [(flip, (30, 300)), (truncate, (10, 100))])
def test_a_damaged_decoded_copy_is_never_read_as_a_number(
    small_cached: Path, tmp_path: Path, damage: Damage, tries: tuple[int, int]
) -> None:
    """Damaged before a job finds it, or below a job that reads it."""
    rng = random.Random(3)
    truths = [Truth.of(place) for place in find_units(work_of(small_cached))]
    for number in range(how_many(*tries)):
        truth = rng.choice(truths)
        copy = Copy(Unit.open(truth.place.path), tmp_path, tuple(truth.arrays), decoded=True)
        copy.make()
        staged = copy.open()
        file = rng.choice(files_of(copy.path))
        if number % 2:
            assert staged.read(rng.choice(list(truth.arrays))) is not None  # it is mapped
        damage(file, rng)
        if number % 2 == 0:
            copy.make()
            staged = copy.open()
        for name, values in truth.arrays.items():
            found = staged.read(name)
            right = np.array_equal(found, values, equal_nan=values.dtype.kind == "f")
            LEDGER.add(f"{damage.__name__}, decoded copy", detected=right, lost=not right)
            assert right, f"{file}, trial {number}"


@pytest.mark.parametrize(("damage", "tries"), [(flip, (40, 300)), (truncate, (10, 60))])
def test_a_damaged_index_is_stale_or_says_the_same(
    small_cached: Path, damage: Damage, tries: tuple[int, int]
) -> None:
    """The index says which cases there are: none may vanish from it silently."""
    rng = random.Random(1)
    work = work_of(small_cached)
    right = _cohort(small_cached)
    files = files_of(work / "index")
    kind = f"{'flipped byte' if damage is flip else 'truncation'}, index"
    for number in range(how_many(*tries)):
        file = rng.choice(files)
        before = damage(file, rng)
        try:
            assert _cohort(small_cached) == right, f"{file}, trial {number}"
        except CacheError:
            pass
        found = verify(work, None, deep=False, everything=False, log=Log(quiet=True)).findings
        LEDGER.add(kind, detected=bool(found), lost=not found)
        assert found, f"{file}, trial {number}"
        file.write_bytes(before)


def test_repair_removes_what_is_damaged_and_the_next_run_makes_it_again(
    small_cached: Path,
) -> None:
    rng = random.Random(2)
    work = work_of(small_cached)
    before = content(work)
    damaged = rng.sample(find_units(work), 5)
    for place, how in zip(damaged, (flip, truncate, flip, truncate, flip), strict=True):
        how(rng.choice(_files(place.path, rng.choice(list(KINDS)))), rng)
    index = rng.choice(files_of(work / "index"))
    truncate(index, rng)
    found = verify(work, None, deep=True, everything=True, log=Log(quiet=True))
    assert {f.path for f in found.damaged} == {*(place.path for place in damaged), index}
    assert set(repair(work, found)) == {f.path for f in found.damaged}
    report = run_stage(small_cached)
    assert sorted(report.done) == sorted(place.name for place in damaged)
    assert report.exit_code == 0
    assert content(work) == before
    assert not verify(work, None, deep=True, everything=True, log=Log(quiet=True)).findings
    LEDGER.add("damaged units and index, repaired", tried=6, detected=6)


def _files(unit: Path, kind: str) -> list[Path]:
    if kind == "attributes":
        return [unit / "zarr.json"]
    return [path for path in files_of(unit, KINDS[kind]) if path != unit / "zarr.json"]


def _read(truth: Truth, rng: random.Random) -> bool:
    """Whether anything was refused; all that was given must be right."""
    refused = False
    try:
        unit = Unit.open(truth.place.path, expect=truth.digest)
        assert unit.attributes == truth.attributes
    except CacheError as error:
        assert str(truth.place.path) in str(error)
        return True
    for name, right in truth.arrays.items():
        shape = (5, 6, 7)
        start = [rng.randrange(n) for n in right.shape[-3:]]
        z, y, x = start
        box = (..., *(slice(a, a + n) for a, n in zip(start, shape, strict=True)))
        for patch, wanted in ((None, right), (Patch((z, y, x), shape), right[box])):
            try:
                values = unit.read(name, patch)
            except CacheError as error:
                assert str(truth.place.path) in str(error)
                refused = True
            else:
                np.testing.assert_array_equal(values, wanted, strict=True)
    return refused


def _cohort(registry: Path) -> object:
    loaded = load_registry(registry)
    cohort = open_cohort(work_of(registry), loaded, teachers=list(loaded.teachers))
    for error in cohort.problems.values():
        raise error
    cases = [
        (case.name, case.split, read_receipt(case.case.path), sorted(case.teachers))
        for case in cohort.cases
    ]
    return cases, dict(cohort.teachers)
