"""`pipeline train-student --self-test`: whether this setup resumes exactly."""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import CacheMissing, ConfigError, PipelineError
from pipeline.folder import Folder

if TYPE_CHECKING:
    from pipeline.log import Log
    from pipeline.self_test import Row, Setup
    from pipeline.student.speed import SpeedFlags
    from stages.train_student import TrainStudentConfig

STEPS, KILLS = 10, 3


def run_self_test(
    registry: Path,
    config: Path | None,
    work: Folder,
    *,
    device: str,
    workers: int,
    flags: SpeedFlags,
    allow_missing: bool,
    steps: int | None,
    seed: int | None,
    log: Log,
) -> None:
    """Tries the user's settings on the user's cache or, where there is none, on a made-up one.

    Raises:
        ConfigError: several processes were started.
        CacheMissing: settings were named and there is no cache to try them on.
        PipelineError: the resumed training is not the undisturbed one; it names the first tensor.
    """
    from pipeline.config import load_config
    from pipeline.network import pick_device
    from pipeline.self_test import Setup
    from pipeline.student.launch import refuse_several
    from pipeline.student.speed import check_device
    from stages.train_student import TrainStudentConfig

    refuse_several("train-student --self-test")
    check_device(flags, pick_device(device))
    seed = secrets.randbelow(10**6) if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="organ-distill-made-up-") as scratch:
        if (work / "cases").exists():
            settings = load_config(config, TrainStudentConfig) if config else TrainStudentConfig()
        elif config is None:
            log.info(f"there is no cache in {work}: the self-test makes one up")
            registry, work, settings = _made_up(Path(scratch), log)
        else:
            raise CacheMissing(
                "there is no cache to try these settings on.",
                where=work,
                fix="Run `pipeline cache-teachers` first, or leave out --config to try the "
                "program on made-up data.",
            )
        if allow_missing:
            settings = settings.model_copy(update={"allow_missing": True})
        setup = Setup(settings, registry, str(work), device, workers, flags)
        _try(setup, steps or STEPS, seed, log)


def refuse_without_self_test(steps: int | None, seed: int | None) -> None:
    """A training takes both from its settings.

    Raises:
        ConfigError: one was given.
    """
    if steps is not None or seed is not None:
        raise ConfigError(
            "--steps and --seed are of the self-test alone.",
            fix="Set training.steps and training.seed in the settings, or add --self-test.",
        )


def _try(setup: Setup, steps: int, seed: int, log: Log) -> None:
    from pipeline.log import print_table
    from pipeline.self_test import self_test

    changes = {"steps": steps, "validate_every": max(1, steps // 3)}
    training = setup.config.training.model_copy(update=changes)
    setup = replace(setup, config=setup.config.model_copy(update={"training": training}))
    log.info(f"self-test: seed {seed} (--seed {seed} repeats it)")
    rows = self_test(setup, kills=KILLS, seed=seed, log=log)
    title = f"Self-test: {steps} steps, seed {seed}"
    columns = ["training", "loader processes", "from step", "to step", "ended by", "equal"]
    print_table(title, columns, [_told(number, row) for number, row in enumerate(rows)])
    if rows[-1].difference:
        raise PipelineError(
            f"the resumed training is not the undisturbed one: {rows[-1].difference}.",
            where="self-test",
            fix="On a GPU, kernels that add in any order differ from run to run; on the CPU this "
            "is a bug: please report it with the table above.",
        )


def _told(number: int, row: Row) -> list[str]:
    return [
        "undisturbed" if number == 0 else f"killed and resumed, process {number}",
        str(row.workers),
        str(row.resumed_from),
        str(row.reached),
        "SIGKILL" if row.killed else "itself",
        "–" if number == 0 else "no" if row.difference else "yes",
    ]


def _made_up(folder: Path, log: Log) -> tuple[Path, Folder, TrainStudentConfig]:
    """The quick demo's cache, and its settings with dropout, which draws random numbers."""
    from pipeline.config import load_config
    from pipeline.demo import fill_demo_cache
    from stages.train_student import TrainStudentConfig

    registry, _ = fill_demo_cache(folder, quick=True, log=log)
    settings = load_config(folder / "train_student_ms_kd.yaml", TrainStudentConfig)
    network = settings.training.network
    network = network.model_copy(update={"args": {**network.args, "dropout": 0.1}})
    training = settings.training.model_copy(update={"network": network})
    return registry.path, folder / "work", settings.model_copy(update={"training": training})
