"""Units in an object store, which has no rename: a unit becomes visible by its receipt.

Each writer uploads a copy of its own, `<unit>.zarr/copy~<host>~<pid>~<digits>/`, then creates
`<unit>.zarr/receipt.json`, which names that copy, unless there is one already. Two writers never
touch each other's objects; a crash in between leaves a copy that no receipt names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from pipeline.cache.receipt import RECEIPT, Receipt, is_valid, read_receipt, write_receipt
from pipeline.errors import CacheError
from pipeline.folder import copy_name, create_object, remove, replace_file, sizes, storage_errors

if TYPE_CHECKING:
    from upath import UPath

_PARALLEL_UPLOADS = 8


def commit_objects(built: Path, unit: UPath, receipt: Receipt) -> None:
    """Uploads what was built in a local folder, then commits it by its receipt.

    Args:
        built: the group as a local folder, without a receipt.
        unit: where it belongs.
        receipt: of what was built; objects named relative to it.

    Raises:
        OSError: the store does not take it.
    """
    copy = copy_name()
    objects = {f"{copy}/{name}": entry for name, entry in receipt.objects.items()}
    committed = False
    try:
        with storage_errors(unit):
            unit.fs.put(
                [str(built / name) for name in receipt.objects],
                [f"{unit.path}/{name}" for name in objects],
                batch_size=_PARALLEL_UPLOADS,
            )
        _check_uploaded(unit, {name: int(entry["bytes"]) for name, entry in objects.items()})
        sealed = write_receipt(replace(receipt, objects=objects, copy=copy)).encode()
        committed = create_object(unit / RECEIPT, sealed)
        if not committed and not is_valid(unit, receipt.digest):
            damaged = _copy_of(unit)
            replace_file(unit / RECEIPT, sealed)
            committed = True
            if damaged:
                remove(unit / damaged)
    finally:
        if not committed:
            remove(unit / copy)


def remove_objects(unit: UPath) -> None:
    """Removes a unit: it vanishes with its receipt; its bytes go after that."""
    remove(unit / RECEIPT)
    remove(unit)


def copies_without_receipt(unit: UPath, names: Iterable[str]) -> list[str]:
    """The copies in a unit's folder that its receipt, if there is one, does not name.

    Args:
        unit: the unit.
        names: of all objects in it.
    """
    there = {name.split("/", 1)[0] for name in names if name.startswith("copy~") and "/" in name}
    if RECEIPT in names and len(there) < 2:
        return []
    return sorted(there - {_copy_of(unit)})


def open_store(folder: UPath) -> Store:
    """A Zarr store to read a group in an object store; failures to reach it are `OSError`."""
    options = dict(folder.storage_options)
    inner = FsspecStore.from_url(str(folder), storage_options=options, read_only=True)
    return _Reached(inner)


class _Reached(WrapperStore[FsspecStore]):
    """What the client of an object store raises becomes an `OSError`."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        async with _as_os_error():
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        async with _as_os_error():
            return await super().get_partial_values(prototype, key_ranges)

    def with_read_only(self, read_only: bool = False) -> _Reached:
        return _Reached(self._store.with_read_only(read_only))


@asynccontextmanager
async def _as_os_error() -> AsyncIterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _check_uploaded(unit: UPath, wanted: dict[str, int]) -> None:
    there: dict[str, Any] = sizes(unit)
    wrong = [name for name, size in wanted.items() if there.get(name) != size]
    if wrong:
        raise OSError(f"{len(wanted)} objects were uploaded, {len(wrong)} did not arrive")


def _copy_of(unit: UPath) -> str:
    """The copy that a receipt names; empty if there is none, or none that can be read."""
    try:
        return read_receipt(unit, objects=False).copy
    except CacheError:
        return ""
