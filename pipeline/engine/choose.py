"""`--executor`: which engine a command line asks for. `distributed` is not imported without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import load_config
from pipeline.engine.here import HERE, Engine
from pipeline.engine.parts import SlurmSettings
from pipeline.errors import ConfigError
from pipeline.folder import Folder, is_local
from pipeline.log import Log


@contextmanager
def open_engine(
    executor: str | None,
    *,
    workers: int | None,
    slurm_config: Path | None,
    device: str,
    work: Folder,
    log: Log,
) -> Iterator[Engine]:
    """The engine for the block.

    Args:
        executor: None: this process; else see `open_cluster`.
        workers: how many to start.
        slurm_config: YAML of `SlurmSettings`.
        device: as given.
        work: jobs of Slurm write their output there.
        log: for the engine.

    Raises:
        ConfigError: options that do not go together, or packages that are not installed.
        EngineError: nothing answers, or nothing starts.
    """
    if executor is None and workers is not None:
        raise ConfigError("--workers without --executor.", fix="Add --executor local or slurm.")
    if executor != "slurm" and slurm_config is not None:
        raise ConfigError(
            "--slurm-config without --executor slurm.",
            fix="Add --executor slurm, or leave --slurm-config out.",
        )
    if executor is None:
        yield HERE
        return
    if workers is not None and executor not in ("local", "slurm"):
        raise ConfigError(
            f"--workers with --executor {executor}: this command does not start workers there.",
            fix="Start them with `dask worker`, before or while this runs.",
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device {device} with --executor: each worker has its own GPU.",
            fix="Give auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses among GPUs.",
        )
    settings = load_config(slurm_config, SlurmSettings) if slurm_config else SlurmSettings()
    try:
        from pipeline.engine.dask import open_cluster
    except ImportError as error:
        raise ConfigError(
            f"--executor needs a package that is not installed ({error.name}).",
            fix="Install it: pip install 'organ-distill[cluster]'; [slurm] for --executor slurm.",
        ) from error
    logs = (work if is_local(work) else Path.cwd()) / settings.logs
    with open_cluster(
        executor, workers=workers, device=device, slurm=settings, logs=logs, log=log
    ) as engine:
        yield engine
