"""What a training reads, on the node's own disk: copied once per node, read from there.

Copies are decoded where the disk has room for that, else they are as the cache stores them. The
processes of a node copy shares of it, and wait for each other. What cannot be copied is read where
it is, and somebody says so; no number depends on it.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cache.places import clean_temporaries
from pipeline.cache.reader import CachedCase, Unit
from pipeline.cache.schema import IMAGE, LABEL, features_name, log_odds_name
from pipeline.cache.staged import Copy
from pipeline.errors import CacheError
from pipeline.folder import temporary_name
from pipeline.log import Log, size
from pipeline.student.distributed import ALONE, Processes
from pipeline.student.inputs import TrainingInputs
from pipeline.student.network import TapKey

# Of the disk: others live on it as well.
_LEFT_FREE = 0.05


@dataclass(frozen=True)
class _Outcome:
    """What one process did.

    Attributes:
        ready: names of the copies that it made or found in order.
        problems: why others are not; a sentence each.
    """

    host: str
    ready: frozenset[str] = frozenset()
    num_bytes: int = 0
    read_bytes: int = 0
    decoded: bool = False
    problems: tuple[str, ...] = ()


def staged_inputs(
    found: TrainingInputs, folder: Path | None, *, log: Log, processes: Processes = ALONE
) -> TrainingInputs:
    """A training's cases, read from copies below a folder; None leaves them as they are.

    `identity` stays what it is: copies are of the very bytes.
    """
    if folder is None:
        return found
    cases = [*found.training, *found.validation]
    staged = staged_cases(cases, folder, taps=list(found.taps), log=log, processes=processes)
    number = len(found.training)
    return replace(found, training=staged[:number], validation=staged[number:])


def staged_cases(
    cases: Sequence[CachedCase],
    folder: Path,
    *,
    taps: Sequence[TapKey] = (),
    log: Log,
    processes: Processes = ALONE,
) -> list[CachedCase]:
    """Cases, read from copies below a folder: images, labels, log-odds of the experts, and taps.

    Args:
        folder: on a disk of this node; the same path on all.
        log: hears what was copied, and of everything that is read from the cache after all.
        processes: that train together; those of one host share the work.
    """
    root = folder / f"organ-distill-staged-{os.getuid()}"
    copies = {copy.name: copy for case in cases for copy in _copies(case, root, taps)}
    decoded = {name: replace(copy, decoded=True) for name, copy in copies.items()}
    host, share = socket.gethostname(), list[Copy]()
    found = processes.gathered(
        lambda: (host, [_why_not(root, list(of.values())) for of in (decoded, copies)])
    )
    ranks_here = [rank for rank, (name, _) in enumerate(found) if name == host]
    is_decoded = not any(found[rank][1][0] for rank in ranks_here)
    copies = decoded if is_decoded else copies
    problems = tuple(why for rank in ranks_here if (why := found[rank][1][1]) and not is_decoded)
    if not problems:
        share = _shares(list(copies.values()), len(ranks_here))[ranks_here.index(processes.rank)]
    own = _Outcome(host, decoded=is_decoded, problems=problems)
    own = _make(own, share, folder, log, processes)
    outcomes = processes.gathered(lambda: own)
    ready = {name for outcome in outcomes if outcome.host == host for name in outcome.ready}
    opened = {name: copies[name].open() for name in ready if copies[name].is_there()}
    _report(outcomes, len(copies), folder, log)
    return [_reading(case, root, taps, opened) for case in cases]


def _copies(case: CachedCase, root: Path, taps: Sequence[TapKey]) -> list[Copy]:
    """Of the case, then of its teachers."""
    copies = [Copy(case.case, root, (IMAGE, LABEL))]
    for teacher, unit in case.teachers.items():
        organs = [organ for organ, experts in case.experts.items() if teacher in experts]
        names = [log_odds_name(organ) for organ in organs]
        names += [features_name(tap) for name, tap in taps if name == teacher]
        copies.append(Copy(unit, root, tuple(names)))
    return copies


def _reading(
    case: CachedCase, root: Path, taps: Sequence[TapKey], opened: Mapping[str, Unit]
) -> CachedCase:
    unit, *units = (opened.get(copy.name, copy.unit) for copy in _copies(case, root, taps))
    return replace(case, case=unit, teachers=dict(zip(case.teachers, units, strict=True)))


def _why_not(root: Path, copies: Sequence[Copy]) -> str:
    """Why nothing can be copied; empty if all can. Makes the folder."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            return f"{root} belongs to somebody else"
        probe = root / temporary_name("writable")
        probe.write_bytes(b"")
        probe.unlink()
        clean_temporaries(root)
        disk = shutil.disk_usage(root)
    except OSError as error:
        return f"{root} cannot be written ({error.strerror or error})"
    need, free = sum(copy.missing_bytes() for copy in copies), disk.free - disk.total * _LEFT_FREE
    if need > free:
        return (
            f"{size(need)} more are needed there and {size(max(0.0, free))} are free, a twentieth "
            "of the disk left aside"
        )
    return ""


def _shares(copies: Sequence[Copy], number: int) -> list[list[Copy]]:
    """Of about equal bytes, the largest first."""
    shares: list[list[Copy]] = [[] for _ in range(number)]
    filled = [0] * number
    for copy in sorted(copies, key=lambda copy: (-copy.num_bytes, copy.name)):
        least = filled.index(min(filled))
        shares[least].append(copy)
        filled[least] += copy.num_bytes
    return shares


def _make(
    own: _Outcome, share: Sequence[Copy], folder: Path, log: Log, processes: Processes
) -> _Outcome:
    """Copies this process's share. Processes meet after every unit, so that none waits so long for
    another that it takes it for dead."""
    left = list(share)
    ready: set[str] = set()
    problems, num_bytes, read_bytes = list(own.problems), 0, 0
    with log.progress(f"copying to {folder}", len(left)) as advance:
        while any(processes.any(bool(left))):
            if not left:
                continue
            copy = left.pop(0)
            try:
                num_bytes += copy.make()
                ready.add(copy.name)
                read_bytes += copy.num_bytes
            except CacheError as error:
                problems.append(str(error))
            except OSError as error:  # mostly a full disk, which the next unit would find too
                problems.append(f"{error.filename or copy.path} ({error.strerror or error})")
                left.clear()
            advance(copy.path.name)
    return replace(
        own, ready=frozenset(ready), num_bytes=num_bytes, read_bytes=read_bytes,
        problems=tuple(problems),
    )  # fmt: skip


def _report(outcomes: Sequence[_Outcome], num_copies: int, folder: Path, log: Log) -> None:
    """One line for all, and for each host one about what is read from the cache after all."""
    hosts = list(dict.fromkeys(outcome.host for outcome in outcomes))
    for host in hosts:
        of_host = [outcome for outcome in outcomes if outcome.host == host]
        ready = {name for outcome in of_host for name in outcome.ready}
        where = f"{host}: " if len(hosts) > 1 else ""
        if ready:
            read = sum(outcome.read_bytes for outcome in of_host)
            how = "decoded" if of_host[0].decoded else "as stored: decoded they do not fit there"
            made = sum(outcome.num_bytes for outcome in of_host)
            log.info(
                f"{where}{len(ready)} of {num_copies} units are read from {folder}, {how}; "
                f"{size(read)}, {size(made)} of it copied now"
            )
        problems = list(dict.fromkeys(p for outcome in of_host for p in outcome.problems))
        if len(ready) < num_copies:
            more = f", and {len(problems) - 1} problems more" if len(problems) > 1 else ""
            log.warn(
                f"{where}{num_copies - len(ready)} of {num_copies} units are read from the cache "
                f"itself, not from {folder}: {problems[0] if problems else 'unknown'}{more}."
            )
