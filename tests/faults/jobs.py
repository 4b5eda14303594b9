"""What children of the nursery do: stage one under some fault, told as plain values."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.registry import load_registry
from pipeline.errors import PipelineError
from pipeline.folder import Folder
from pipeline.log import Log
from pipeline.review.verify import verify
from stages.report import StageReport
from tests.faults.small import run_stage
from tests.object_store import environment
from tests.tiny import training_settings, work_of

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NEW_MOUNTS, _RECURSIVE, _PRIVATE, _READ_ONLY, _BIND, _REMOUNT = (
    0x20000,
    16384,
    1 << 18,
    1,
    4096,
    32,
)


class Watch:
    """Counts what changes files below a folder, and acts before the nth of these operations."""

    def __init__(
        self, folder: Path, nth: int = 0, act: Callable[[], object] = lambda: None
    ) -> None:
        self.operations = 0
        self.written: set[str] = set()
        self._folder, self._nth, self._act, self._acting = str(folder), nth, act, False
        sys.addaudithook(self._see)
        real = os.fsync

        def fsync(handle: int) -> None:
            self._count()
            real(handle)

        os.fsync = fsync

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[2], int) and args[2] & _WRITES and self._below(args[0]):
                self.written.add(os.fspath(args[0]))
                self._count()
        elif event in _CHANGES:
            relative = args[-1] != -1 and event in ("os.remove", "os.rmdir")  # as rmtree does
            if relative or self._below(args[0]):
                self._count()
        elif event == "os.rename" and self._below(args[1]):
            self.written.add(os.fspath(args[1]))

    def _below(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)

    def _count(self) -> None:
        if self._acting:
            return
        self.operations += 1
        if self._nth and self.operations >= self._nth:
            self._nth, self._acting = 0, True
            self._act()
            self._acting = False


def cache(registry: str, *, bits: int = 5, kill_at: int = 0, file_limit: int = 0) -> dict[str, Any]:
    """Stage one; `kill_at`: killed before that operation on files, `file_limit`: bytes a file."""
    path = Path(registry)
    watch = Watch(work_of(path), kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    return {**_run(path, bits), "operations": watch.operations, "written": sorted(watch.written)}


def cache_to_store(
    registry: str, work: str, endpoint: str, *, kill_at: int = 0, kill_before: str = "nothing"
) -> dict[str, Any]:
    """Stage one into an object store; killed before the request `kill_at` to it, or before the
    first that puts an object whose name ends with `kill_before`."""
    os.environ.update(environment(endpoint))
    from s3fs import S3FileSystem

    from pipeline.folder import parse_folder

    calls = 0
    real = S3FileSystem._call_s3

    async def counted(self: S3FileSystem, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        puts = args[0] == "put_object" and kwargs["Key"].endswith(kill_before)
        if calls == kill_at or puts:
            os.kill(os.getpid(), signal.SIGKILL)
        return await real(self, *args, **kwargs)

    S3FileSystem._call_s3 = counted
    return {**_run(Path(registry), 5, parse_folder(work)), "calls": calls}


def modules(job: str, **args: Any) -> list[str]:
    """What another job imports, so that the parent can import it before it forks."""
    globals()[job](**args)
    return sorted(sys.modules)


def train(registry: str, run: str = "student", **changes: Any) -> dict[str, Any]:
    """A student of two steps; which files it wrote."""
    from pipeline.student.speed import TrainingExecution
    from stages import train_student
    from stages.report import Scope

    path = Path(registry)
    training = training_settings(**{"steps": 2, "supervision": {"kind": "ms_kd"}} | changes)
    config = train_student.TrainStudentConfig.model_validate({"run": run, "training": training})
    watch = Watch(work_of(path))
    scope = Scope(load_registry(path, files=False), work_of(path), Log(quiet=True))
    report = train_student.run(config, scope, TrainingExecution(device="cpu"))
    return {**_told(report), "written": sorted(watch.written)}


def full_disk(registry: str, fill_at: int) -> dict[str, Any]:
    """Stage one on a disk of 4 MB that somebody else fills before the given operation."""
    path = Path(registry)
    work = work_of(path)
    work.mkdir()
    problem = _mount(work, "size=4m")
    if problem:
        return {"impossible": problem}
    ballast = work / "students" / "ballast"
    ballast.parent.mkdir()
    watch = Watch(work, fill_at, lambda: _fill(ballast))
    full = _run(path, 5)
    ballast.unlink()
    return {"operations": watch.operations, "full": full, "damaged": _damaged(path),
            "again": _run(path, 5), "damaged_again": _damaged(path)}  # fmt: skip


def predict(folder: str, *, overlap: float = 0.5, kill_at: int = 0, fill_at: int = 0,
            disk: bool = False) -> dict[str, Any]:  # fmt: skip
    """The images of `folder/in` into `folder/out` with probabilities. `kill_at`: killed before that
    operation on files there; `disk`: `out` is a disk of 2 MB, and somebody else fills it before the
    operation `fill_at`; then the same once more with room."""
    from pipeline.student.predicted import Probabilities
    from stages import predict as stage

    root = Path(folder)
    out, images = root / "out", stage.chosen_inputs(root / "in", None, None)
    out.mkdir(exist_ok=True)
    if disk and (problem := _mount(out, "size=2m")):
        return {"impossible": problem}
    ballast = out / "ballast"
    act = (lambda: _fill(ballast)) if disk else (lambda: os.kill(os.getpid(), signal.SIGKILL))
    watch = Watch(out, fill_at or kill_at, act)

    def run(overlap: float) -> dict[str, Any]:
        config = stage.PredictConfig(overlap=overlap)
        try:
            report = stage.run(
                config, root / "student.pt", images, out,
                stage.PredictExecution("cpu", probabilities=Probabilities("float16")),
                log=Log(quiet=True),
            )  # fmt: skip
        except PipelineError as error:
            return {"stopped": f"{type(error).__name__}: {error}", "exit_code": error.exit_code}
        return {**_told(report), "files": _files(out)}

    first = run(overlap)
    if not disk:
        return {**first, "operations": watch.operations}
    ballast.unlink(missing_ok=True)
    return {"full": first, "again": run(overlap), "operations": watch.operations}


def _files(folder: Path) -> dict[str, str]:
    """Name -> SHA-256, but for the ballast."""
    from pipeline.config import file_sha256

    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "ballast")
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in found}


def read_only(registry: str, folder: str) -> dict[str, Any]:
    """Stage one while a folder, relative to the work folder, cannot be written."""
    path = Path(registry)
    problem = _mount(work_of(path) / folder, None)
    if problem:
        return {"impossible": problem}
    return {**_run(path, 5), "damaged": _damaged(path)}


def _run(registry: Path, bits: int, work: Folder | None = None) -> dict[str, Any]:
    """A report, or the error that stopped everything, with the exit code of the command."""
    try:
        return _told(run_stage(registry, bits=bits, work=work))
    except PipelineError as error:
        return {"stopped": f"{type(error).__name__}: {error}", "exit_code": error.exit_code}


def _told(report: StageReport) -> dict[str, Any]:
    failed = {unit: f"{type(error).__name__}: {error}" for unit, error in report.failed.items()}
    return {
        "done": report.done,
        "skipped": report.skipped,
        "failed": failed,
        "exit_code": report.exit_code,
    }


def _damaged(registry: Path) -> list[str]:
    found = verify(work_of(registry), None, deep=True, everything=True, log=Log(quiet=True))
    return [finding.unit for finding in found.findings]


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def _mount(folder: Path, disk: str | None) -> str:
    """A small disk at a folder, or that folder again but read-only, for this process alone.

    Returns:
        Why it cannot be done; empty if it is done.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    at = os.fsencode(folder)
    steps = [
        lambda: libc.unshare(_NEW_MOUNTS),
        lambda: libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None),
    ]
    if disk is not None:
        steps.append(lambda: libc.mount(b"tmpfs", at, b"tmpfs", 0, disk.encode()))
    else:
        steps.append(lambda: libc.mount(at, at, None, _BIND, None))
        steps.append(lambda: libc.mount(at, at, None, _BIND | _REMOUNT | _READ_ONLY, None))
    for step in steps:
        if step():
            return f"no mount of one's own: {os.strerror(ctypes.get_errno())}"
    return ""
