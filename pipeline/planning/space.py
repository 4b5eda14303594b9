"""Whether what stage one will write fits: free space, free inodes, a quota."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError
from pipeline.folder import Folder, is_local, sizes
from pipeline.planning.rates import Estimate

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Space:
    """What a work folder's disk has left.

    Attributes:
        free_bytes: for this user; None in an object store, which does not fill.
        free_inodes: for this user; None where the file system does not say.
        block_bytes: smallest piece that a file takes; 0 in an object store.
        used_bytes: what the work folder takes now; 0 if there is no quota to hold it against.
        quota_bytes: what it may hold; None for no quota.
    """

    free_bytes: int | None
    free_inodes: int | None
    block_bytes: int
    used_bytes: int
    quota_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def look_at(work: Folder, quota_bytes: int | None) -> Space:
    """Asks the file system that a work folder is on, or will be."""
    if not is_local(work):
        used = 0 if quota_bytes is None else sum(sizes(work).values())
        return Space(None, None, 0, used, quota_bytes)
    there = work.absolute()
    while not there.exists():
        there = there.parent
    found = os.statvfs(there)
    used = 0
    if quota_bytes is not None and work.exists():
        found_files = (path.stat() for path in work.rglob("*") if path.is_file())
        used = sum(max(file.st_size, 512 * file.st_blocks) for file in found_files)
    return Space(
        free_bytes=found.f_bavail * found.f_frsize,
        free_inodes=found.f_favail if found.f_files else None,
        block_bytes=found.f_frsize,
        used_bytes=used,
        quota_bytes=quota_bytes,
    )


def on_disk(parts: Iterable[Estimate], block_bytes: int) -> int:
    """Bytes that are really taken: half a block is lost per file, a folder takes a whole one."""
    return round(sum(p.total_bytes + block_bytes * (0.5 * p.files + p.folders) for p in parts))


def shortfall(parts: Iterable[Estimate], space: Space) -> str:
    """What does not fit, as a sentence; empty if all does."""
    wanted = list(parts)
    need, inodes = on_disk(wanted, space.block_bytes), sum(p.inodes for p in wanted)
    if space.free_bytes is not None and need > space.free_bytes:
        return f"stage one needs about {size(need)} more, and {size(space.free_bytes)} are free."
    if space.free_inodes is not None and inodes > space.free_inodes:
        return (
            f"stage one makes about {inodes} more files and folders, and the file system takes "
            f"{space.free_inodes}."
        )
    if space.quota_bytes is not None and space.used_bytes + need > space.quota_bytes:
        return (
            f"stage one needs about {size(need)} more; with the {size(space.used_bytes)} that the "
            f"work folder holds this passes the quota of {size(space.quota_bytes)}."
        )
    return ""


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 99.5 or unit == "B" else f"{value:.3g} {unit}"


def parse_size(text: str) -> int:
    """`2 TB`, `500GB`, `1.5TiB`, `1e12` -> bytes.

    Raises:
        ConfigError: it is no size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ConfigError(
            f"{text!r} is no size.", where="--quota", fix='Write bytes, or for example "2 TB".'
        )
    power = " kmgtp".index(match[2].lower() or " ")
    base = 1024.0 if match[3] else 1000.0
    return round(float(match[1]) * base**power)
