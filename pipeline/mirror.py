"""A run's folder in an object store, worked on as a folder of this machine.

Training appends to files, replaces them and renames them, which no object store can do. So the run
is fetched when it begins, worked on here, and sent back whenever it has saved its state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import PipelineError, WorkFolderError
from pipeline.folder import (
    Folder,
    is_local,
    local_temporaries,
    remove,
    sizes,
    storage_errors,
    temporary_name,
)

if TYPE_CHECKING:
    from upath import UPath

_State = dict[str, tuple[int, int]]


@contextmanager
def mirrored(folder: Folder) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A local folder to work in, and what to call when its state is worth keeping.

    A local folder is itself, and there is nothing to call for. Errors raised within the block name
    the folder that the user knows.

    Raises:
        WorkFolderError: the object store cannot be read or written.
    """
    if is_local(folder):
        yield folder, _nothing
        return
    local = local_temporaries() / temporary_name("run")
    try:
        sent = _fetch(folder, local)
        yield local, lambda: _send(local, folder, sent)
    except PipelineError as error:
        if error.where is not None:
            error.where = error.where.replace(str(local), str(folder))
        raise
    finally:
        shutil.rmtree(local, ignore_errors=True)


def _nothing() -> None:
    return None


def _fetch(remote: UPath, local: Path) -> _State:
    local.mkdir(parents=True, exist_ok=True)
    try:
        for name in sizes(remote):
            target = local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with storage_errors(remote):
                remote.fs.get_file(f"{remote.path}/{name}", str(target))
    except OSError as error:
        raise WorkFolderError(
            f"the run cannot be fetched ({error}).",
            where=remote,
            fix="Check the object store, and free space for temporary files (TMPDIR) here.",
        ) from error
    return _state(local)


def _send(local: Path, remote: UPath, sent: _State) -> None:
    """Sends what changed, what depends on nothing first: killed in between, what is there is a
    state to go on from."""
    now = _state(local)
    try:
        for name in sorted(now, key=_rank):
            if sent.get(name) != now[name]:
                with storage_errors(remote):
                    remote.fs.put_file(str(local / name), f"{remote.path}/{name}")
                sent[name] = now[name]
        for name in sorted(set(sent) - set(now)):
            remove(remote / name)
            del sent[name]
    except OSError as error:
        raise WorkFolderError(
            f"the state of the run cannot be written ({error}).",
            where=remote,
            fix="Run the same command again: it goes on from the last checkpoint that was written.",
        ) from error


def _state(local: Path) -> _State:
    """Name -> size and time of change in ns; without what is being written just now."""
    files = (p for p in local.rglob("*") if p.is_file() and not p.name.endswith(".tmp"))
    return {
        path.relative_to(local).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in files
    }


def _rank(name: str) -> tuple[int, str]:
    """Metrics may run ahead of the checkpoint, never behind; "finished" says that all is there."""
    if name.startswith("checkpoints/"):
        return 1, name
    return {"student.pt": 2, "finished.json": 3}.get(name, 0), name
