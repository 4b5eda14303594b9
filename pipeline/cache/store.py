"""Units on disk: written whole under a temporary name, vouched for by a receipt, then renamed.

A unit exists if, and only if, its receipt does. Nothing is ever overwritten: another digest is
another path, and of two writers of one unit the second removes its own copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from pipeline.cache.provenance import Inputs
from pipeline.cache.schema import (
    FORMAT_VERSION,
    ArraySpec,
    StorageConfig,
    create_array,
    describe,
)
from pipeline.config import digest
from pipeline.errors import (
    CacheCorrupt,
    CacheIncomplete,
    CacheMissing,
    CacheStale,
    WorkFolderError,
)

RECEIPT = "receipt.json"
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Receipt:
    """What a unit vouches for.

    Attributes:
        digest: of `inputs`.
        inputs: everything that determines the unit's numbers.
        arrays: name -> shape, dtype, axes.
        objects: file, relative to the unit -> size in bytes and SHA-256.
        seconds: what it took to make.
    """

    digest: str
    inputs: Inputs
    arrays: Mapping[str, Mapping[str, Any]]
    objects: Mapping[str, Mapping[str, Any]]
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Stored size."""
        return sum(int(entry["bytes"]) for entry in self.objects.values())


def write_unit(
    path: Path,
    arrays: Sequence[ArraySpec],
    attributes: Mapping[str, Any],
    inputs: Inputs,
    *,
    storage: StorageConfig,
    seconds: float,
) -> Receipt:
    """Writes a unit; it becomes visible whole, or not at all.

    Returns:
        The receipt of the unit that is now at `path`: ours, or that of another writer who was
        faster with the same digest.

    Raises:
        WorkFolderError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(_temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.create_group(temporary, zarr_format=3, attributes=dict(attributes))
        for spec in arrays:
            create_array(group, spec, storage)
        receipt = {
            "format_version": FORMAT_VERSION,
            "digest": digest(inputs),
            "inputs": inputs,
            "arrays": {spec.name: describe(spec) for spec in arrays},
            "objects": _sync_and_hash(temporary),
            "seconds": round(seconds, 3),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        _write_synced(temporary / RECEIPT, json.dumps(receipt, indent=1))
        _make_visible(temporary, path)
        return read_receipt(path)
    except OSError as error:
        raise WorkFolderError(
            f"the unit could not be written ({error.strerror or error}).",
            where=path,
            fix="Check free space, quota and permissions; units that are done stay done.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_receipt(path: Path, *, expect: str | None = None) -> Receipt:
    """Reads and checks a unit's receipt, its objects' presence and their sizes (cheap).

    Args:
        path: the unit.
        expect: digest that it must have; None takes any.

    Raises:
        CacheMissing: no receipt.
        CacheStale: another digest than expected, or another format version.
        CacheIncomplete: objects are missing or have another size.
        CacheCorrupt: the receipt cannot be read, or does not match its own digest.
    """
    again = "Run `pipeline cache-teachers` again: it recomputes this unit alone."
    try:
        data = json.loads((path / RECEIPT).read_text(encoding="utf-8"))
        receipt = Receipt(*(data[k] for k in ("digest", "inputs", "arrays", "objects", "seconds")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissing("not in the cache.", where=path, fix=again) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheCorrupt(f"unreadable receipt ({error}).", where=path, fix=again) from error
    if data.get("format_version") != FORMAT_VERSION:
        raise CacheStale(
            f"written in format {data.get('format_version')}, this program reads {FORMAT_VERSION}.",
            where=path,
            fix=again,
        )
    if digest(receipt.inputs) != receipt.digest:
        raise CacheCorrupt("the receipt does not match its own digest.", where=path, fix=again)
    if expect is not None and receipt.digest != expect:
        raise CacheStale(
            f"made from other inputs (digest {receipt.digest[:16]}, expected {expect[:16]}).",
            where=path,
            fix=again,
        )
    _check_objects(path, receipt, again)
    return receipt


def verify_unit(path: Path) -> Receipt:
    """Reads every byte of a unit and holds it against the receipt (deep).

    Raises:
        CacheError: as `read_receipt`, and CacheCorrupt for an object whose bytes changed.
    """
    receipt = read_receipt(path)
    for name, entry in receipt.objects.items():
        found = hashlib.sha256((path / name).read_bytes()).hexdigest()
        if found != entry["sha256"]:
            raise CacheCorrupt(
                f"{name} has other bytes than were written.",
                where=path,
                fix="Run `pipeline cache-teachers` again: it recomputes this unit alone.",
            )
    return receipt


def prepare_work_folder(work: Path) -> None:
    """Makes sure that a work folder exists and can be written.

    Raises:
        WorkFolderError: otherwise.
    """
    probe = work / f".writable.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        work.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise WorkFolderError(
            f"the work folder cannot be written ({error.strerror or error}).",
            where=work,
            fix="Choose another folder with --work, or correct its permissions.",
        ) from error


def clean_temporaries(folder: Path) -> int:
    """Removes what writers of this host left that no longer live; returns how many.

    A temporary of another host, or of a living process, is left alone.
    """
    removed = 0
    for path in folder.rglob(f".*{_TEMPORARY}"):
        host, pid = path.name.removesuffix(_TEMPORARY).split("~")[1:3]
        if host == socket.gethostname() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
    return removed


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; one that says the same already is left alone."""
    text = json.dumps(value, indent=1)
    if _reads(path, text):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _write_synced(temporary, text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _reads(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def _temporary_name(name: str) -> str:
    return f".{name}~{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}{_TEMPORARY}"


def _make_visible(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError:
        # The place is taken: by another writer of the same digest, or by a unit that is damaged.
        if _is_valid(path):
            return
        broken = path.with_name(_temporary_name(path.name))
        path.rename(broken)
        temporary.rename(path)
        shutil.rmtree(broken, ignore_errors=True)
    _sync_folder(path.parent)


def _is_valid(path: Path) -> bool:
    try:
        verify_unit(path)
    except (CacheMissing, CacheIncomplete, CacheCorrupt, CacheStale):
        return False
    return True


def _check_objects(path: Path, receipt: Receipt, fix: str) -> None:
    for name, entry in receipt.objects.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CacheIncomplete(f"{name} is missing.", where=path, fix=fix) from error
        if size != entry["bytes"]:
            raise CacheIncomplete(
                f"{name} has {size} bytes instead of {entry['bytes']}.", where=path, fix=fix
            )


def _sync_and_hash(folder: Path) -> dict[str, dict[str, Any]]:
    objects = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        objects[file.relative_to(folder).as_posix()] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        _sync_folder(inner)
    _sync_folder(folder)
    return objects


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
