"""Folders, local or in an object store, behind the one interface that pathlib has; and a run's
folder in a store, worked on here.

A local folder is a `pathlib.Path`. `s3://bucket/prefix`, and whatever else fsspec knows, is a
`upath.UPath`, which follows the same interface. What the two do not share is here: an object store
has no rename and no append, but it can refuse to create what exists; its client raises errors of
its own, which leave here as `OSError`, as do those of a disk: from all that reads, lists or writes,
where it does not say otherwise.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pipeline.errors import ConfigError, PipelineError, StoreUnreachable, WorkFolderError, listed

if TYPE_CHECKING:
    from typing_extensions import TypeIs
    from upath import UPath

    Folder: TypeAlias = Path | UPath
else:
    Folder: TypeAlias = Path


def parse_folder(text: str | Folder) -> Folder:
    """`work` -> a local path; `s3://bucket/work` -> a folder of an object store.

    Credentials, endpoint and region come from where the store's own tools take them (for S3 the
    `AWS_*` variables or `~/.aws`).

    Raises:
        ConfigError: a kind of store that is unknown, or whose package is not installed.
    """
    if "://" not in str(text):
        return Path(str(text))
    protocol, _, rest = str(text).partition("://")
    if protocol == "file":
        return Path(f"/{rest.lstrip('/')}")
    from upath import UPath

    try:
        # A listing that is remembered would hide what other jobs write.
        found = UPath(str(text), use_listings_cache=False)
        _ = found.fs
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"this kind of folder cannot be used ({error}).",
            where=text,
            fix="For s3:// install organ-distill[s3]; for another store the package that fsspec "
            "names for it.",
        ) from error
    return found


def is_local(folder: Folder) -> TypeIs[Path]:
    """Whether a folder is on a disk of this machine, or one that looks so."""
    return isinstance(folder, Path)


def local_temporaries() -> Path:
    """Where, on this machine's own disk, what goes into an object store is built."""
    return Path(tempfile.gettempdir()) / f"organ-distill-{os.getuid()}"


def temporary_name(name: str) -> str:
    """A name for what is being written: hidden, and it says by which process of which host."""
    return f".{name}~{writer_name()}.tmp"


def written_by_dead(name: str) -> bool:
    """Whether a name made by `temporary_name`, or by `copy_name`, is of a process of this host
    that no longer lives."""
    parts = name.removesuffix(".tmp").rsplit("~", 3)
    if len(parts) != 4:
        return False
    _, host, pid, _ = parts
    return host == socket.gethostname() and pid.isdecimal() and not _alive(int(pid))


def copy_name() -> str:
    """A name for one writer's copy of a unit in an object store."""
    return f"copy~{writer_name()}"


def writer_name() -> str:
    """`<host>~<pid>~<digits>`: no other writer has it."""
    return f"{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}"


def read_bytes(path: Folder) -> bytes:
    """A file's bytes, of one moment: in a store by one request, which `open` does not promise."""
    if is_local(path):
        return path.read_bytes()
    with storage_errors(path):
        return bytes(path.fs.cat_file(path.path))


def read_range(path: Folder, begin: int, end: int) -> bytes:
    """The bytes of a file from one offset to another; fewer where it ends before."""
    if is_local(path):
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), end - begin, begin)
    with storage_errors(path):
        return bytes(path.fs.cat_file(path.path, start=begin, end=end))


def read_text(path: Folder) -> str:
    """A file's text, UTF-8; another one is a `UnicodeDecodeError`."""
    return read_bytes(path).decode("utf-8")


def replace_file(path: Folder, data: bytes) -> None:
    """Writes a file: a reader sees the old one or the new one. The folder is made."""
    if not is_local(path):
        with storage_errors(path):
            path.fs.pipe_file(path.path, data)
        return
    replace_files({path: data})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Likewise several that belong together: all are on the disk before the first one is replaced,
    so that a full disk leaves the old ones."""
    temporaries = {path: path.with_name(temporary_name(path.name)) for path in contents}
    try:
        for path, temporary in temporaries.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            temporary.replace(path)
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def writing(where: object, fix: str = "") -> Iterator[None]:
    """Within the block, what the disk refuses becomes a `WorkFolderError`."""
    try:
        yield
    except OSError as error:
        raise WorkFolderError(
            f"it cannot be written ({error.strerror or error}).",
            where=where,
            fix=fix or "Check free space, quota and permissions, then run the same command again.",
        ) from error


def refuse_foreign(
    command: str,
    targets: Iterable[tuple[Folder, bool]],
    *,
    fix: str = "Move away what is there, or name another --output.",
) -> None:
    """To be called before anything is computed: what a command did not write it does not replace.

    Args:
        command: as it is typed, without `pipeline`.
        targets: what it would write; of each, whether the command wrote what may be there.

    Raises:
        ConfigError: it names the files that are in the way, the first few of them.
    """
    others = (path for path, is_ours in targets if not is_ours)
    if foreign := [path for path in others if path.exists() or path.is_symlink()]:
        more = f", nor {listed([path.name for path in foreign[1:]])}" if foreign[1:] else ""
        raise ConfigError(
            f"`pipeline {command}` did not write this file and does not replace it{more}.",
            where=foreign[0],
            fix=fix,
        )


def changed_since(command: str, path: Path) -> ConfigError:
    """The error for a file that a command wrote and somebody changed, by a correction say."""
    return ConfigError(
        f"it was changed since `pipeline {command}` wrote it: it is neither taken for what was "
        "written nor replaced.",
        where=path,
        fix="Move it away, or name another --output.",
    )


def json_with(path: Folder, *keys: str) -> dict[str, Any] | None:
    """The object in a JSON file, if it has these keys; None where it has not, or is none."""
    try:
        found = json.loads(_regular(path))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and all(key in found for key in keys) else None


def contains(path: Folder, text: str) -> bool:
    """Whether a text stands in a file; False for one that cannot be read."""
    try:
        return text.encode() in _regular(path)
    except OSError:
        return False


def _regular(path: Folder) -> bytes:
    """A device or a pipe is not waited for."""
    return read_bytes(path) if not is_local(path) or path.is_file() else b""


def create_object(path: UPath, data: bytes) -> bool:
    """Writes an object of a store unless it exists; returns whether it was written."""
    with storage_errors(path):
        try:
            path.fs.pipe_file(path.path, data, mode="create")
        except FileExistsError:
            return False
    return True


def sizes(folder: Folder) -> dict[str, int]:
    """All files below a folder: name relative to it, with slashes -> bytes. A folder that is not
    there has none, and what is removed meanwhile is passed over."""
    return {name: found[0] for name, found in _files(folder).items()}


def matching(folder: Folder, pattern: str) -> list[Folder]:
    """What lies below a folder and matches a pattern of `glob`, sorted by path.

    Raises:
        StoreUnreachable: an object store does not answer.
    """
    try:
        with storage_errors(folder):
            found: list[Folder] = sorted(folder.glob(pattern), key=str)
    except OSError as error:
        raise unreachable(folder, error) from error
    return found


def ages(folder: Folder) -> dict[str, float]:
    """Like `sizes`: name -> seconds since it was last written."""
    now = time.time()
    return {name: now - found[1] for name, found in _files(folder).items()}


def folders_below(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk`, for paths: what another process removes meanwhile is passed over, which
    `Path.rglob` does not do."""
    yield from ((Path(root), folders, files) for root, folders, files in os.walk(folder))


def remove(path: Folder) -> None:
    """Removes a file or a folder with all that is in it; one that is not there is no error."""
    if is_local(path):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return
    with storage_errors(path), suppress(FileNotFoundError):
        path.fs.rm(path.path, recursive=True)


def check_writable(path: Path) -> None:
    """Asks, and writes nothing, whether a folder can be made or written at a path: what takes hours
    asks before it begins.

    Raises:
        WorkFolderError: a file stands in its way, or permissions do.
    """
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return
    why = "nobody may write into" if folder.is_dir() else "a file is in the way,"
    raise WorkFolderError(
        f"this folder cannot be written: {why} {folder}.",
        where=path,
        fix="Name another folder, or correct its permissions.",
    )


def check_answers(folder: Folder) -> None:
    """Makes sure that an object store can be asked; a local folder is not looked at.

    Raises:
        WorkFolderError: it does not answer, there is no such bucket, or it may not be read.
    """
    if is_local(folder):
        return
    try:
        with storage_errors(folder), suppress(FileNotFoundError):
            folder.fs.ls(folder.path, detail=False)
        with storage_errors(folder):
            folder.fs.ls(folder.path.split("/")[0], detail=False)
    except OSError as error:
        raise WorkFolderError(
            f"the object store cannot be used ({error}).",
            where=folder,
            fix="Check the bucket's name, credentials, endpoint and region (for S3: AWS_* or "
            "~/.aws).",
        ) from error


def unreachable(path: Folder, error: Exception) -> StoreUnreachable:
    """The error for an object store that did not answer."""
    return StoreUnreachable(
        f"the object store did not answer ({error}).",
        where=path,
        fix="Nothing is known to be wrong with the cache: try again.",
    )


@contextmanager
def storage_errors(folder: Folder) -> Iterator[None]:
    """Within the block, what an object store's client raises becomes an `OSError`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if is_local(folder):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _files(folder: Folder) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    if is_local(folder):
        for root, _, names in folders_below(folder):
            for name in names:
                with suppress(OSError):  # removed meanwhile
                    status = (root / name).stat()
                    relative = (root / name).relative_to(folder).as_posix()
                    found[relative] = status.st_size, status.st_mtime
        return found
    with storage_errors(folder):
        entries = folder.fs.find(folder.path, detail=True)
    below = f"{folder.path.rstrip('/')}/"
    for key, entry in entries.items():
        written = entry.get("LastModified") or entry.get("mtime") or entry.get("created")
        when = written.timestamp() if hasattr(written, "timestamp") else float(written or 0.0)
        found[key.removeprefix("/").removeprefix(below.removeprefix("/"))] = entry["size"], when
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


# A run's folder in an object store, worked on as a folder of this machine.
#
# Training appends to files, replaces them and renames them, which no object store can do. So the
# run is fetched when it begins, worked on here, and sent back whenever it has saved its state.
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
        yield folder, lambda: None
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
    status = {path.relative_to(local).as_posix(): path.stat() for path in files}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in status.items()}


def _rank(name: str) -> tuple[int, str]:
    """Metrics may run ahead of the checkpoint, never behind; "finished" says that all is there."""
    if name.startswith("checkpoints/"):
        return 1, name
    return {"student.pt": 2, "finished.json": 3}.get(name, 0), name
