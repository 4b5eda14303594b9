"""Faults of a work folder in an object store: killed at any request, two writers, damaged and lost
objects, a store that does not answer. The server is a real one, in a process of its own."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.cache.index import read_index
from pipeline.cache.places import dead_temporaries, find_units
from pipeline.cache.reader import Unit
from pipeline.cache.receipt import RECEIPT, read_receipt
from pipeline.errors import CacheError, CacheIncomplete, StoreUnreachable
from pipeline.folder import copy_name, replace_file, sizes
from pipeline.log import Log
from pipeline.review.verify import deep_problems, repair, verify
from tests.faults.ledger import LEDGER, how_many
from tests.faults.nursery import Job, Nursery
from tests.faults.small import run_stage, unit_names
from tests.object_store import BUCKET, folder
from tests.tiny import copy_cohort, work_of

if TYPE_CHECKING:
    from upath import UPath

    from pipeline.folder import Folder


@pytest.fixture(scope="module")
def storing(
    nursery: Nursery,
    small_built: Path,
    store_endpoint: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Nursery:
    """It has imported what an object store needs."""
    registry = copy_cohort(small_built, tmp_path_factory.mktemp("small") / "storing")
    args = {"registry": str(registry), "endpoint": store_endpoint, "work": f"s3://{BUCKET}/warm"}
    nursery.warm(Job("modules", {"job": "cache_to_store", **args}))
    return nursery


@pytest.fixture(scope="module")
def filled(
    small_built: Path, store_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, UPath]:
    """A registry and its cache in the store; each test leaves it whole."""
    registry = copy_cohort(small_built, tmp_path_factory.mktemp("small") / "filled")
    work = folder(f"{BUCKET}/filled/work")
    assert run_stage(registry, work=work).exit_code == 0
    return registry, work


def numbers(work: Folder) -> dict[str, dict[str, Any]]:
    """Unit -> its objects by the name within the group, with their sizes and checksums."""
    found = {}
    for place in find_units(work):
        receipt = read_receipt(place.path)
        found[str(place.path).removeprefix(str(work))] = dict(receipt.contents)
    return found


def extra(work: UPath) -> list[str]:
    """Objects of units that no receipt vouches for."""
    known = set()
    for place in find_units(work):
        below = str(place.path).removeprefix(f"{work}/")
        receipt = read_receipt(place.path)
        known |= {f"{below}/{name}" for name in (RECEIPT, *receipt.objects)}
    stored = (name for name in sizes(work) if name.startswith(("cases/", "teachers/")))
    return sorted(set(stored) - known)


def assert_whole(registry: Path, work: UPath, undisturbed: Path) -> None:
    """Every unit is there once, as an undisturbed run on a disk makes it, and nothing else."""
    report = run_stage(registry, work=work)
    assert (report.failed, report.exit_code) == ({}, 0)
    assert {*report.done, *report.skipped} == unit_names(registry)
    assert numbers(work) == numbers(work_of(undisturbed))
    assert extra(work) == []


@pytest.mark.slow
def test_killed_at_any_request_a_rerun_gives_what_an_undisturbed_run_gives(
    storing: Nursery, small: Path, undisturbed: Path, store_work: UPath, store_endpoint: str
) -> None:
    rng = random.Random(6)
    args = {"registry": str(small), "endpoint": store_endpoint}
    (whole,) = storing.run(Job("cache_to_store", {**args, "work": str(store_work / "whole")}))
    assert whole.status == 0, whole.output
    assert whole.result["exit_code"] == 0, whole.result
    for number in range(how_many(1, 40)):
        work = store_work / str(number)
        for share in (1.0, 0.5):
            kill_at = rng.randint(1, int(share * whole.result["calls"]))
            (outcome,) = storing.run(
                Job("cache_to_store", {**args, "work": str(work), "kill_at": kill_at})
            )
            assert outcome.killed or outcome.status == 0, outcome.output
            visible = [p for p in find_units(work) if (p.path / RECEIPT).exists()]
            assert not [p for p in visible if deep_problems(p)]
            LEDGER.add("SIGKILL at a random request to an object store")
        assert_whole(small, work, undisturbed)


def test_a_crash_between_arrays_and_receipt_leaves_no_unit(
    storing: Nursery, small: Path, undisturbed: Path, store_work: UPath, store_endpoint: str
) -> None:
    """The moment by itself: all objects are uploaded, the receipt is not."""
    args = {"registry": str(small), "work": str(store_work), "endpoint": store_endpoint}
    (outcome,) = storing.run(Job("cache_to_store", {**args, "kill_before": RECEIPT}))
    assert outcome.killed, outcome.output
    (unit,) = find_units(store_work)
    uploaded = sizes(unit.path)
    assert len(uploaded) >= 5
    with pytest.raises(CacheError, match="not in the cache"):
        Unit.open(unit.path)
    assert_whole(small, store_work, undisturbed)
    LEDGER.add("a crash between arrays and receipt in an object store")


@pytest.mark.parametrize("damaged", [False, True])
def test_two_writers_end_with_one_valid_unit(
    storing: Nursery,
    small: Path,
    undisturbed: Path,
    store_work: UPath,
    store_endpoint: str,
    damaged: bool,
) -> None:
    rng = random.Random(7)
    if damaged:
        run_stage(small, work=store_work)
        for place in find_units(store_work):
            _truncate(place.path / rng.choice(sorted(read_receipt(place.path).objects)), rng)
    args = {"registry": str(small), "work": str(store_work), "endpoint": store_endpoint}
    job = Job("cache_to_store", args)
    for outcome in storing.run(job, job):
        assert outcome.status == 0, outcome.output
        assert outcome.result["failed"] == {}
    for place in find_units(store_work):
        assert deep_problems(place) == []
    assert_whole(small, store_work, undisturbed)
    LEDGER.add(f"two writers in an object store{', over damaged units' if damaged else ''}")


@pytest.mark.parametrize("how", ["flipped byte", "truncation", "lost object"])
def test_damage_is_found_named_and_mended(
    how: str, filled: tuple[Path, UPath], undisturbed: Path
) -> None:
    rng = random.Random(8)
    small, store_work = filled
    places = find_units(store_work)
    for _ in range(how_many(2, 60)):
        place = rng.choice(places)
        path = place.path / rng.choice(sorted(sizes(place.path)))
        before = path.read_bytes()
        {"flipped byte": _flip, "truncation": _truncate, "lost object": _lose}[how](path, rng)
        assert deep_problems(place)
        _assert_refused_or_right(place.path, undisturbed, store_work)
        replace_file(path, before)
        LEDGER.add(f"{how} in an object store")
    place = rng.choice(places)
    _truncate(place.path / sorted(read_receipt(place.path).objects)[0], rng)
    found = verify(store_work, None, deep=True, everything=True, log=Log(quiet=True))
    assert [str(path) for path in repair(store_work, found)] == [str(place.path)]
    assert sizes(place.path) == {}
    assert_whole(small, store_work, undisturbed)


def test_a_copy_that_nobody_named_goes_after_a_day(
    filled: tuple[Path, UPath], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer's host may be gone for good, so its process cannot be asked after."""
    small, store_work = filled
    unit = find_units(store_work)[0].path
    copy = copy_name().replace("copy~", "copy~elsewhere-", 1)
    replace_file(unit / copy / "zarr.json", b"{}")
    assert dead_temporaries(store_work) == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert [str(path) for path in dead_temporaries(store_work)] == [str(unit / copy)]
    assert_whole(small, store_work, undisturbed)


def test_a_store_that_does_not_answer_is_no_damage(
    filled: tuple[Path, UPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `verify --repair` would remove a cache because a network was down."""
    store_work = filled[1]
    place = find_units(store_work)[0]
    unit = Unit.open(place.path)
    names = sorted(unit.receipt.arrays)
    unit.array(names[0])

    def down(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Could not connect to the endpoint URL")

    from s3fs import S3FileSystem

    with monkeypatch.context() as patch:
        patch.setattr(S3FileSystem, "_call_s3", down)
        for ask in (
            lambda: Unit.open(place.path),
            lambda: unit.read(names[0]),
            lambda: Unit(place.path, unit.receipt).attributes,
        ):
            with pytest.raises(StoreUnreachable, match=r"did not answer .*Could not connect"):
                ask()
        for look in (lambda: deep_problems(place), lambda: read_index(store_work)):
            with pytest.raises(StoreUnreachable):
                look()
    assert deep_problems(place) == []


def test_a_lost_chunk_is_no_fill_value(filled: tuple[Path, UPath]) -> None:
    store_work = filled[1]
    place = next(place for place in find_units(store_work) if place.teacher is not None)
    unit = Unit.open(place.path)
    assert unit.read("log_odds/liver").size
    (shard,) = (name for name in unit.receipt.objects if "log_odds/liver/c/" in name)
    before = (place.path / shard).read_bytes()
    (place.path / shard).unlink()
    with pytest.raises(CacheIncomplete, match=r"chunk \(0, 0, 0\) of array log_odds/liver"):
        unit.read("log_odds/liver")
    replace_file(place.path / shard, before)


def _assert_refused_or_right(path: Folder, undisturbed: Path, work: UPath) -> None:
    """A damaged unit raises when it is opened or read, or else it gives the right numbers."""
    sound = Unit.open(work_of(undisturbed) / str(path).removeprefix(f"{work}/"))
    try:
        unit = Unit.open(path)
        for name in unit.receipt.arrays:
            assert unit.read(name).tobytes() == sound.read(name).tobytes()
    except CacheError as error:
        assert str(path) in str(error)


def _flip(path: Any, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    replace_file(path, bytes(data))


def _truncate(path: Any, rng: random.Random) -> None:
    data = path.read_bytes()
    replace_file(path, data[: rng.randrange(len(data))])


def _lose(path: Any, rng: random.Random) -> None:
    path.unlink()
