"""What is lost or laid out of place: a shard, a receipt, arrays, a unit under another's name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cache.reader import Unit
from pipeline.cache.receipt import RECEIPT
from pipeline.cli.app import app
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import load_registry
from pipeline.errors import CacheError, CacheIncomplete
from pipeline.review.verify import cheap_problems, deep_problems
from tests.faults.ledger import LEDGER
from tests.faults.small import content, files_of, hidden, place_named, run_stage
from tests.tiny import work_of

NAMES = ("liver-ct/case_001", "one x liver-ct/case_001")


def lose_shard(unit: Path) -> None:
    files_of(unit, "c/**/*")[0].unlink()


def lose_receipt(unit: Path) -> None:
    (unit / RECEIPT).unlink()


def lose_arrays(unit: Path) -> None:
    for path in unit.iterdir():
        if path.name != RECEIPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def lose_all_but_the_folder(unit: Path) -> None:
    shutil.rmtree(unit)
    unit.mkdir()


def become_a_file(unit: Path) -> None:
    shutil.rmtree(unit)
    unit.write_bytes(b"")


def take_anothers_place(unit: Path) -> None:
    other = next(p for p in sorted(unit.parent.glob("*.zarr")) if p != unit)
    shutil.rmtree(unit)
    shutil.copytree(other, unit)


def take_anothers_arrays(unit: Path) -> None:
    """Same sizes, own receipt: only reading every byte tells."""
    other = next(p for p in sorted(unit.parent.glob("*.zarr")) if p != unit)
    name = files_of(unit, "c/**/*")[0].relative_to(unit)
    data = (other / name).read_bytes()
    size = (unit / name).stat().st_size
    (unit / name).write_bytes(data[:size].ljust(size, b"\0"))


LOSSES = {
    "a deleted shard": lose_shard,
    "arrays without a receipt": lose_receipt,
    "a receipt without arrays": lose_arrays,
    "an empty folder for a unit": lose_all_but_the_folder,
    "a file for a unit": become_a_file,
    "another case's unit in its place": take_anothers_place,
}


@pytest.mark.parametrize("what", LOSSES)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_named_refused_and_made_again_alone(small_cached: Path, what: str, name: str) -> None:
    work = work_of(small_cached)
    before = content(work)
    place = place_named(work, name)
    LOSSES[what](place.path)
    assert cheap_problems(place)
    loaded = load_registry(small_cached)
    cohort = open_cohort(work, loaded, teachers=list(loaded.teachers))
    assert set(cohort.problems) == {name}
    assert str(place.path) in str(cohort.problems[name])
    verified = CliRunner().invoke(
        app, ["cache", "verify", "-q", "-r", str(small_cached), "-w", str(work)]
    )
    assert verified.exit_code == 1
    assert name in verified.output.replace("\n", "")
    report = run_stage(small_cached)
    assert (report.done, report.failed, report.exit_code) == ([name], {}, 0)
    assert content(work) == before
    assert hidden(work) == []
    LEDGER.add(what)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_another_unit_are_found_by_the_deep_check(small_cached: Path, name: str) -> None:
    place = place_named(work_of(small_cached), name)
    take_anothers_arrays(place.path)
    assert cheap_problems(place) == []
    assert deep_problems(place)
    LEDGER.add("another unit's bytes in a shard")


@pytest.mark.parametrize("lose", [lose_shard, lose_arrays])
def test_what_is_lost_after_opening_is_not_read_as_fill(
    small_cached: Path, lose: Callable[[Path], None]
) -> None:
    name = "one x liver-ct/case_001"
    unit = Unit.open(place_named(work_of(small_cached), name).path)
    arrays = sorted(unit.receipt.arrays)
    for array in arrays:
        unit.array(array)
    lose(unit.path)
    lost = []
    for array in arrays:
        try:
            unit.read(array)
        except CacheError as error:
            assert isinstance(error, CacheIncomplete)
            assert name in str(error)
            lost.append(array)
    assert lost == (arrays[:1] if lose is lose_shard else arrays)
    LEDGER.add("lost between opening and reading")
