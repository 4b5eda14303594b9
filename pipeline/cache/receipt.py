"""Receipts: a unit exists if, and only if, its receipt does, and is what its receipt says.

A receipt vouches for itself too: its last field, `seal`, is the digest of all others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.cache.provenance import Inputs
from pipeline.cache.schema import FORMAT_VERSION
from pipeline.config import digest, file_sha256
from pipeline.errors import CacheCorrupt, CacheIncomplete, CacheMissing, CacheStale

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
        seconds: what it took to make.
        written: when, UTC, as `2026-11-23T07:30:00Z`.
        teacher_inputs: what `inputs["teacher_digest"]` is the digest of; empty in a case unit.
        notes: what else is worth knowing of how it came to be; in no digest, mostly empty.
    """

    digest: str
    inputs: Inputs
    arrays: Mapping[str, Mapping[str, Any]]
    objects: Mapping[str, Mapping[str, Any]]
    seconds: float
    written: str
    teacher_inputs: Inputs
    notes: Mapping[str, Any] = field(default_factory=dict)

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
    }
    return json.dumps({**data, "seal": digest(data)}, indent=1)


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
    try:
        data = json.loads((path / RECEIPT).read_text(encoding="utf-8"))
        version = data["format_version"]
        known = {entry.name: data.get(entry.name) for entry in fields(Receipt)}
        receipt = Receipt(**{**known, "notes": data.get("notes", {})})
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissing("not in the cache.", where=path, fix=_AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    check_objects(path, receipt)
    return receipt


def verify_unit(path: Path, *, expect: str | None = None) -> Receipt:
    """Reads every byte of a unit and holds it against the receipt (deep).

    Raises:
        CacheError: as `read_receipt`, and CacheCorrupt for an object whose bytes changed.
    """
    receipt = read_receipt(path, expect=expect)
    verify_seal(path, receipt)
    for name in receipt.objects:
        verify_object(path, receipt, name)
    return receipt


def verify_seal(path: Path, receipt: Receipt) -> None:
    """Holds a receipt's file, byte by byte, against what it says.

    Raises:
        CacheCorrupt: they differ, if only in white space.
    """
    if (path / RECEIPT).read_text(encoding="utf-8") != write_receipt(receipt):
        raise CacheCorrupt("the receipt has other bytes than were written.", where=path, fix=REMOVE)


def verify_object(path: Path, receipt: Receipt, name: str) -> None:
    """Reads one file of a unit and holds it against the receipt.

    Raises:
        CacheIncomplete, CacheCorrupt: it is gone, or its bytes changed.
    """
    try:
        found = file_sha256(path / name)
    except OSError as error:
        raise CacheIncomplete(f"{name} is missing.", where=path, fix=_AGAIN) from error
    if name not in receipt.objects or found != receipt.objects[name]["sha256"]:
        raise CacheCorrupt(f"{name} has other bytes than were written.", where=path, fix=REMOVE)


def _is_sealed(data: Mapping[str, Any]) -> bool:
    try:
        sealed = digest({key: value for key, value in data.items() if key != "seal"})
        return bool(data["seal"] == sealed and data["digest"] == digest(data["inputs"]))
    except (KeyError, ValueError):  # ValueError: a number that became infinite
        return False


def check_objects(path: Path, receipt: Receipt, below: str = "") -> None:
    """Looks whether the files of a unit, or of one array in it, are there with their sizes.

    Args:
        path: the unit.
        receipt: its receipt.
        below: only files whose names begin so.

    Raises:
        CacheIncomplete: one is not.
    """
    for name, entry in receipt.objects.items():
        if not name.startswith(below):
            continue
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CacheIncomplete(f"{name} is missing.", where=path, fix=_AGAIN) from error
        if size != entry["bytes"]:
            raise CacheIncomplete(
                f"{name} has {size} bytes instead of {entry['bytes']}.", where=path, fix=_AGAIN
            )
