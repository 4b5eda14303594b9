"""Units: written whole where nobody looks, vouched for by a receipt, then made visible at once.

On a disk a unit is renamed into place; in an object store its receipt is created last. A unit
exists if, and only if, its receipt does. Nothing is ever overwritten: another digest is another
path, and of two writers of one unit the second removes its own copy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from pipeline.cache.receipt import RECEIPT, Receipt, is_valid, read_receipt, write_receipt
from pipeline.cache.schema import ArraySpec, Inputs, StorageConfig, describe
from pipeline.cache.shards import encode_array, encode_group
from pipeline.config import digest
from pipeline.errors import CacheError, WorkFolderError
from pipeline.folder import (
    Folder,
    check_answers,
    copy_name,
    create_object,
    is_local,
    local_temporaries,
    read_text,
    remove,
    replace_file,
    sizes,
    storage_errors,
    temporary_name,
    writing,
)

if TYPE_CHECKING:
    from upath import UPath

_ATTEMPTS = 8
_FIX = "Check free space, quota and permissions; units that are done stay done."
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True)
class Made:
    """How a unit came to be, for its receipt; in no digest.

    Attributes:
        teacher_inputs: what the teacher's digest in its inputs is of, so that a difference can be
            named later; empty for a case.
    """

    seconds: float = 0.0
    teacher_inputs: Inputs = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def write_unit(
    path: Folder,
    arrays: Sequence[ArraySpec],
    attributes: Mapping[str, Any],
    inputs: Inputs,
    *,
    storage: StorageConfig,
    made: Made = Made(),
) -> Receipt:
    """Writes a unit; it becomes visible whole, or not at all.

    Returns:
        The receipt of the unit that is now at `path`: ours, or that of another writer who was
        faster with the same digest.

    Raises:
        WorkFolderError: the folder cannot be written, or the disk is full.
    """
    with writing(path, _FIX), _building(path) as temporary:
        files = {"zarr.json": encode_group(attributes)}
        for spec in arrays:
            files |= encode_array(spec, storage)
        _write_synced(temporary, files)
        receipt = Receipt(
            digest=digest(inputs),
            inputs=inputs,
            arrays={spec.name: describe(spec) for spec in arrays},
            objects=_objects(files),
            seconds=round(made.seconds, 3),
            written=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            teacher_inputs=made.teacher_inputs,
            notes=made.notes,
        )
        if is_local(path):
            _write_synced(temporary, {RECEIPT: write_receipt(receipt).encode()})
            if _make_visible(temporary, path, receipt.digest):
                return receipt
        else:
            commit_objects(temporary, path, receipt)
    return read_receipt(path, expect=receipt.digest)


def add_notes(path: Folder, receipt: Receipt, notes: Mapping[str, Any]) -> Receipt:
    """Adds to what the receipt of a unit notes; its numbers and its digest stay.

    Raises:
        WorkFolderError: it cannot be written.
    """
    noted = replace(receipt, notes={**receipt.notes, **notes})
    with writing(path / RECEIPT, _FIX):
        replace_file(path / RECEIPT, write_receipt(noted).encode())
    return noted


@contextmanager
def _building(path: Folder) -> Iterator[Path]:
    """The name of a folder to build a unit in: beside its place, or, for an object store, on this
    machine's own temporary disk. What is left in it at the end of the block is removed."""
    if is_local(path):
        temporary = path.with_name(temporary_name(path.name))
    else:
        temporary = local_temporaries() / temporary_name(path.name)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare_work_folder(work: Folder) -> None:
    """Makes sure that a work folder exists and can be written."""
    check_answers(work)
    probe = work / temporary_name("writable")
    with writing(work, "Name another folder, or correct its permissions."):
        if is_local(work):
            work.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
        else:
            replace_file(probe, b"")
        remove(probe)


@contextmanager
def scratch_folder(work: Folder) -> Iterator[Path]:
    """A folder on the work folder's disk for what is thrown away at the end of the block; for an
    object store, on this machine's temporary disk.

    If this process is killed first, the next run of stage one removes it.
    """
    prepare_work_folder(work)
    folder = (work if is_local(work) else local_temporaries()) / temporary_name("scratch")
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_unit(path: Folder) -> None:
    """Removes a unit: it vanishes whole, on a disk by a rename; its bytes go after that.

    Killed in between, it leaves a temporary of a dead process. A folder that it leaves empty goes
    too.

    Raises:
        WorkFolderError: it cannot be removed.
    """
    try:
        if not is_local(path):  # it vanishes with its receipt
            remove(path / RECEIPT)
            remove(path)
            return
        aside = path.with_name(temporary_name(path.name))
        path.rename(aside)
        remove(aside)
    except FileNotFoundError:
        return  # another process was faster
    except OSError as error:
        raise WorkFolderError(
            f"the unit could not be removed ({error.strerror or error}).",
            where=path,
            fix="Check the permissions of its folder.",
        ) from error
    for folder in (path.parent, path.parent.parent):
        try:
            folder.rmdir()
        except OSError:  # not empty
            return


def write_json(path: Folder, value: Any) -> None:
    """Writes a JSON file atomically; one that says the same already is left alone.

    Raises:
        WorkFolderError: the folder cannot be written, or the disk is full.
    """
    text = json_text(value)
    with suppress(OSError, UnicodeDecodeError):
        if read_text(path) == text:
            return
    with writing(path, _FIX):
        replace_file(path, text.encode())


def json_text(value: Any) -> str:
    """As `write_json` writes it."""
    return json.dumps(value, indent=1)


def _make_visible(temporary: Path, path: Path, expect: str) -> bool:
    """Renames; where the place is taken, by a unit that is damaged or by another writer of the same
    digest, a valid unit stays: returns False. Other writers may do the same at every moment."""
    for attempt in range(_ATTEMPTS):
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in _TAKEN or attempt == _ATTEMPTS - 1:
                raise
        else:
            break
        if is_valid(path, expect):
            return False
        broken = path.with_name(temporary_name(path.name))
        with suppress(FileNotFoundError):  # another was faster
            path.rename(broken)
        remove(broken)
    _sync_folder(path.parent)
    return True


def _write_synced(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files and forces their bytes onto the disk, at once: a disk takes many such requests
    in the time of one, and units may be small. Daemon threads, as in `engine.here`.

    The folders in between are not forced, only the one that the unit appears in: a name that a
    crash loses is missed by the receipt, and the unit is made again.
    """
    failed: list[BaseException] = []

    def sync(file: IO[bytes]) -> None:
        try:
            os.fsync(file.fileno())
        except BaseException as error:
            failed.append(error)

    with ExitStack() as opened:
        threads = []
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context((folder / name).open("wb"))
            file.write(data)
            file.flush()
            threads.append(Thread(target=sync, args=[file], daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


def _objects(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """What a receipt says of them, folder by folder."""
    return {
        name: {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in sorted(files, key=lambda name: name.split("/"))
    }


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Units in an object store, which has no rename: a unit becomes visible by its receipt.
#
# Each writer uploads a copy of its own, `<unit>.zarr/copy~<host>~<pid>~<digits>/`, then creates
# `<unit>.zarr/receipt.json`, which names that copy, unless there is one already. Two writers never
# touch each other's objects; a crash in between leaves a copy that no receipt names.

_PARALLEL_UPLOADS = 8


def commit_objects(built: Path, unit: UPath, receipt: Receipt) -> None:
    """Uploads what was built in a local folder, then commits it by its receipt.

    Args:
        built: the group as a local folder, without a receipt.
        receipt: of what was built; objects named relative to it.
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
        there = sizes(unit)
        wrong = [name for name, entry in objects.items() if there.get(name) != entry["bytes"]]
        if wrong:
            raise OSError(f"{len(objects)} objects were uploaded, {len(wrong)} did not arrive")
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


def copies_without_receipt(unit: UPath, names: Iterable[str]) -> list[str]:
    """The copies in a unit's folder, by the names of all objects in it, that its receipt, if there
    is one, does not name."""
    there = {name.split("/", 1)[0] for name in names if name.startswith("copy~") and "/" in name}
    if RECEIPT in names and len(there) < 2:
        return []
    return sorted(there - {_copy_of(unit)})


def _copy_of(unit: UPath) -> str:
    """The copy that a receipt names; empty if there is none, or none that can be read."""
    try:
        return read_receipt(unit, objects=False).copy
    except CacheError:
        return ""
