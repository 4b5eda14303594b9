"""Receipts: a unit exists if, and only if, its receipt does, and is what its receipt says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.provenance import Inputs
from pipeline.cache.schema import FORMAT_VERSION
from pipeline.config import digest, file_sha256
from pipeline.errors import CacheCorrupt, CacheIncomplete, CacheMissing, CacheStale

RECEIPT = "receipt.json"
_AGAIN = "Run `pipeline cache-teachers` again: it recomputes this unit alone."
REMOVE = "Remove this folder, then run `pipeline cache-teachers`: it recomputes this unit alone."


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
        receipt = Receipt(*(data[k] for k in ("digest", "inputs", "arrays", "objects", "seconds")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheMissing("not in the cache.", where=path, fix=_AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheCorrupt(f"unreadable receipt ({error}).", where=path, fix=_AGAIN) from error
    if data.get("format_version") != FORMAT_VERSION:
        raise CacheStale(
            f"written in format {data.get('format_version')}, this program reads {FORMAT_VERSION}.",
            where=path,
            fix=_AGAIN,
        )
    if digest(receipt.inputs) != receipt.digest:
        raise CacheCorrupt("the receipt does not match its own digest.", where=path, fix=_AGAIN)
    if expect is not None and receipt.digest != expect:
        raise CacheStale(
            f"made from other inputs (digest {receipt.digest[:16]}, expected {expect[:16]}).",
            where=path,
            fix=_AGAIN,
        )
    _check_objects(path, receipt)
    return receipt


def verify_unit(path: Path, *, expect: str | None = None) -> Receipt:
    """Reads every byte of a unit and holds it against the receipt (deep).

    Raises:
        CacheError: as `read_receipt`, and CacheCorrupt for an object whose bytes changed.
    """
    receipt = read_receipt(path, expect=expect)
    for name in receipt.objects:
        verify_object(path, receipt, name)
    return receipt


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


def _check_objects(path: Path, receipt: Receipt) -> None:
    for name, entry in receipt.objects.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CacheIncomplete(f"{name} is missing.", where=path, fix=_AGAIN) from error
        if size != entry["bytes"]:
            raise CacheIncomplete(
                f"{name} has {size} bytes instead of {entry['bytes']}.", where=path, fix=_AGAIN
            )
