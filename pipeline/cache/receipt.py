"""Receipts: a unit exists if, and only if, its receipt does, and is what its receipt says.

A receipt vouches for itself too: its last field, `seal`, is the digest of all others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.cache.schema import FORMAT_VERSION, Inputs
from pipeline.config import digest, file_sha256
from pipeline.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMissing, CacheStale
from pipeline.folder import Folder, is_local, read_bytes, read_text, sizes, unreachable

RECEIPT = "receipt.json"
_AGAIN = "Run `pipeline cache-teachers` again: it recomputes this unit alone."
REMOVE = (
    "Run `pipeline cache verify --deep --repair`, which removes damaged units, then `pipeline "
    "cache-teachers`: it recomputes them alone."
)


@dataclass(frozen=True)
class Receipt:
    """What a unit vouches for.

    Attributes:
        digest: of `inputs`.
        inputs: everything that determines the unit's numbers.
        arrays: name -> shape, dtype, axes.
        objects: file, relative to the unit -> size in bytes and SHA-256.
        written: when, UTC, as `2026-11-23T07:30:00Z`.
        teacher_inputs: what `inputs["teacher_digest"]` is the digest of; empty in a case unit.
        notes: what else is worth knowing of how it came to be; in no digest, mostly empty.
        copy: the folder within the unit that the group is in; empty: the unit's own. Units in an
            object store have one, since there each writer uploads a copy of its own.
    """

    digest: str
    inputs: Inputs
    arrays: Mapping[str, Mapping[str, Any]]
    objects: Mapping[str, Mapping[str, Any]]
    seconds: float
    written: str
    teacher_inputs: Inputs
    notes: Mapping[str, Any] = field(default_factory=dict)
    copy: str = ""

    @property
    def swallowed(self) -> tuple[str, ...]:
        """Organs of a case that its label's file shows, and of which no voxel is on the grid."""
        return tuple(o for o, voxels in self.notes.get("file_voxels", {}).items() if voxels)

    def object_name(self, name: str) -> str:
        """The name, relative to the unit, of a file of the group."""
        return f"{self.copy}/{name}" if self.copy else name

    @property
    def contents(self) -> Mapping[str, Mapping[str, Any]]:
        """`objects` by their names within the group, wherever the unit is."""
        return {n.removeprefix(f"{self.copy}/"): entry for n, entry in self.objects.items()}

    @property
    def num_bytes(self) -> int:
        """Stored size."""
        return sum(int(entry["bytes"]) for entry in self.objects.values())


def write_receipt(receipt: Receipt) -> str:
    """The text of a receipt, sealed."""
    data = {
        "format_version": FORMAT_VERSION,
        "digest": receipt.digest,
        "inputs": receipt.inputs,
        "teacher_inputs": receipt.teacher_inputs,
        # Left out when empty: a unit without notes has the text and the seal it always had.
        **({"notes": receipt.notes} if receipt.notes else {}),
        "arrays": receipt.arrays,
        "objects": receipt.objects,
        "seconds": receipt.seconds,
        "written": receipt.written,
        **({"copy": receipt.copy} if receipt.copy else {}),
    }
    return json.dumps({**data, "seal": digest(data)}, indent=1)


def read_receipt(path: Folder, *, expect: str | None = None, objects: bool = True) -> Receipt:
    """Reads and checks a unit's receipt, its objects' presence and their sizes (cheap).

    Args:
        expect: digest that it must have; None takes any.
        objects: False leaves out the objects.

    Raises:
        CacheMissing: no receipt.
        CacheStale: another digest than expected, or another format version.
        CacheIncomplete: objects are missing or have another size.
        CacheCorrupt: the receipt cannot be read, or does not match its own digest.
        StoreUnreachable: an object store does not answer.
    """
    try:
        data = json.loads(read_text(path / RECEIPT))
        version = data["format_version"]
        known = {entry.name: data.get(entry.name) for entry in fields(Receipt)}
        optional = {"notes": data.get("notes", {}), "copy": data.get("copy", "")}
        receipt = Receipt(**{**known, **optional})
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissing("not in the cache.", where=path, fix=_AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and not is_local(path):
            raise unreachable(path, error) from error
        raise CacheCorrupt(f"unreadable receipt ({error}).", where=path, fix=_AGAIN) from error
    if version != FORMAT_VERSION:
        raise CacheStale(
            f"written in format {version}, this program reads {FORMAT_VERSION}.",
            where=path,
            fix=_AGAIN,
        )
    if not _is_sealed(data):
        raise CacheCorrupt("the receipt does not match its own digest.", where=path, fix=_AGAIN)
    if expect is not None and receipt.digest != expect:
        raise CacheStale(
            f"made from other inputs (digest {receipt.digest[:16]}, expected {expect[:16]}).",
            where=path,
            fix=_AGAIN,
        )
    if objects:
        check_objects(path, receipt)
    return receipt


def verify_unit(path: Folder, *, expect: str | None = None) -> Receipt:
    """Reads every byte of a unit and holds it against the receipt (deep).

    Raises:
        CacheError: as `read_receipt`, and CacheCorrupt for an object whose bytes changed.
    """
    receipt = read_receipt(path, expect=expect)
    verify_seal(path, receipt)
    for name in receipt.objects:
        verify_object(path, receipt, name)
    return receipt


def is_valid(path: Folder, expect: str) -> bool:
    """Whether a unit of that digest is there and `verify_unit` finds nothing wrong."""
    try:
        verify_unit(path, expect=expect)
    except CacheError:
        return False
    return True


def verify_seal(path: Folder, receipt: Receipt) -> None:
    """Holds a receipt's file, byte by byte, against what it says.

    Raises:
        CacheCorrupt: they differ, if only in white space.
    """
    if read_text(path / RECEIPT) != write_receipt(receipt):
        raise CacheCorrupt("the receipt has other bytes than were written.", where=path, fix=REMOVE)


def read_object(path: Folder, receipt: Receipt, name: str) -> bytes:
    """A small file of a unit, read once and held against the receipt; see `verify_object`."""
    data = b""

    def sha256(file: Folder) -> str:
        nonlocal data
        data = read_bytes(file)
        return hashlib.sha256(data).hexdigest()

    verify_object(path, receipt, name, sha256)
    return data


def verify_object(
    path: Folder, receipt: Receipt, name: str, sha256: Callable[[Folder], str] = file_sha256
) -> None:
    """Reads one file of a unit and holds it against the receipt.

    Args:
        name: as in `receipt.objects`.

    Raises:
        CacheIncomplete, CacheCorrupt: it is gone, or its bytes changed.
        StoreUnreachable: an object store does not answer.
    """
    try:
        found = sha256(path / name)
    except OSError as error:
        if not is_local(path) and not isinstance(error, FileNotFoundError):
            raise unreachable(path, error) from error
        raise CacheIncomplete(f"{name} is missing.", where=path, fix=_AGAIN) from error
    if name not in receipt.objects or found != receipt.objects[name]["sha256"]:
        raise CacheCorrupt(f"{name} has other bytes than were written.", where=path, fix=REMOVE)


def check_objects(path: Folder, receipt: Receipt) -> None:
    """Looks whether the files of a unit are there with their sizes.

    Raises:
        CacheIncomplete: one is not.
        StoreUnreachable: an object store does not answer.
    """
    try:
        there = _sizes(path, list(receipt.objects))
    except OSError as error:
        raise unreachable(path, error) from error
    for name, entry in receipt.objects.items():
        if name not in there:
            raise CacheIncomplete(f"{name} is missing.", where=path, fix=_AGAIN)
        if there[name] != entry["bytes"]:
            raise CacheIncomplete(
                f"{name} has {there[name]} bytes instead of {entry['bytes']}.",
                where=path,
                fix=_AGAIN,
            )


def _sizes(path: Folder, names: Sequence[str]) -> dict[str, int]:
    """One listing in an object store, where every question costs a round trip."""
    if not is_local(path):
        return sizes(path)
    found = {}
    for name in names:
        with suppress(OSError):
            found[name] = (path / name).stat().st_size
    return found


def _is_sealed(data: Mapping[str, Any]) -> bool:
    try:
        sealed = digest({key: value for key, value in data.items() if key != "seal"})
        return bool(data["seal"] == sealed and data["digest"] == digest(data["inputs"]))
    except (KeyError, ValueError):  # ValueError: a number that became infinite
        return False
