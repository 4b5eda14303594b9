"""The training loop: straight down, resumable at any step, the same whatever interrupted it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.reader import CachedCase
from pipeline.cohort import Temperatures
from pipeline.errors import ConfigError, PipelineError
from pipeline.labels import LabelSpace
from pipeline.log import Log
from pipeline.student.dataset import to_batch
from pipeline.student.loading import loaded_batches, patches_of
from pipeline.student.loggers.run_logger import RunLogger
from pipeline.student.network import CachedTap, StudentNetwork, TapKey, seeded_network
from pipeline.student.optimiser import build_optimiser
from pipeline.student.picture import draw_progress
from pipeline.student.progress import followed
from pipeline.student.resume import restore_state, save_state, stop_signals
from pipeline.student.settings import TrainingConfig
from pipeline.student.speed import Speed, SpeedFlags
from pipeline.student.step import make_step
from pipeline.student.validation import validate


@dataclass(frozen=True)
class Trained:
    """The outcome of a training.

    Attributes:
        network: with its last weights, on the CPU, in evaluation mode.
        validation_dice: per organ, of the last step; None where no validation case shows it.
        step: steps that were made in all; fewer than asked for if it was stopped.
        finished: whether all steps were made.
        seconds: of this run of the program.
    """

    network: StudentNetwork
    validation_dice: Mapping[str, float | None]
    step: int
    finished: bool
    seconds: float


def train(
    config: TrainingConfig,
    space: LabelSpace,
    cases: Sequence[CachedCase],
    validation: Sequence[CachedCase],
    folder: Path,
    *,
    taps: Mapping[TapKey, CachedTap],
    inputs: Mapping[str, Any],
    log: Log,
    device: torch.device,
    temperatures: Temperatures | None = None,
    workers: int = 0,
    pool_mb: int = 512,
    checkpoint_minutes: float = 10.0,
    resume: bool = True,
    saved: Callable[[], None] | None = None,
    name: str = "",
    loggers: Sequence[RunLogger] = (),
    flags: SpeedFlags | None = None,
) -> Trained:
    """Trains, or goes on training, until `config.steps`.

    Args:
        config: what changes numbers.
        space: the organs.
        cases: to train on.
        validation: labelled cases to validate on; may be empty.
        folder: of the run: checkpoints, metrics.jsonl, progress.png.
        taps: cached taps for the feature term.
        inputs: what else determines the outcome (case and teacher digests), for the run's digest.
        log: where progress goes.
        device: where to train.
        temperatures: (teacher, organ) -> T of a calibrated supervision; also in `inputs`.
        workers: loader processes; changes speed only.
        pool_mb: decoded chunks kept in each of them; changes speed only.
        checkpoint_minutes: at most so much work is lost to a kill.
        resume: go on from the newest checkpoint; False refuses if there is one.
        saved: called whenever a checkpoint has been written.
        name: of the run, for people; by default the folder's.
        loggers: who is told beside metrics.jsonl.
        flags: precision, memory format, compiling; changes speed and rounding.

    Raises:
        ConfigError: no case to train on.
        CheckpointError: the folder holds a run with other settings, or nothing readable.
        PipelineError: the loss became NaN.
    """
    if not cases:
        raise ConfigError(
            "there is no case to train on.",
            where=folder,
            fix="Look at the splits in the registry, and at `pipeline status`.",
        )
    began = last_save = time.monotonic()
    uses = config.supervision.uses_features
    network = seeded_network(
        config.network,
        len(space.organs),
        seed=config.seed,
        patch=config.patch,
        head=config.supervision.head,
        taps=config.supervision.features.student_taps if uses else (),
        cached=taps if uses else {},
        deep_supervision=config.deep_supervision,
    ).to(device)
    speed = Speed(flags, device)
    speed.prepare(network, network.network, log)
    optimiser = build_optimiser(config.optimiser, network)
    data = patches_of(config, space, cases, network, temperatures, pool_mb)
    for remark in data.remarks():
        log.warn(remark)
    identity = {"config": config.model_dump(mode="json"), "inputs": dict(inputs)}
    step = start = restore_state(
        folder, identity, network, optimiser, speed, seed=config.seed, log=log, resume=resume
    )
    network.train()
    with (
        stop_signals() as stopping,
        followed(
            folder, identity["config"], resumed_from=start, batch_size=config.batch_size,
            warn=log.warn, name=name, loggers=loggers,
        ) as metrics,
        log.progress("steps", config.steps, done=start) as advance,
        loaded_batches(data, start, config, workers) as loader,
    ):  # fmt: skip
        scores: dict[str, float | None] = dict(metrics.last_validation)
        for collated in metrics.batches(loader):
            if isinstance(collated, PipelineError):
                raise collated
            batch = to_batch(collated, list(network.cached), device)
            try:
                line = make_step(config, network, optimiser, batch, speed, step)
                metrics.add(step + 1, **line)
            except FloatingPointError as error:
                raise PipelineError(
                    f"step {step + 1}, with cases {', '.join(collated['case'])}: {error}",
                    where=folder,
                    fix="The last checkpoint is intact. Look at these cases, or lower "
                    "optimiser.lr.",
                ) from error
            step += 1
            advance(metrics.note)
            if step % config.validate_every == 0 or step == config.steps:
                with speed.autocast():
                    scores = validate(network.network, validation, space, config, device)
                metrics.add_validation(step, scores)
                if metrics.picture_is_old:
                    draw_progress(folder / "progress.png", metrics)
                network.train()
            due = time.monotonic() - last_save > checkpoint_minutes * 60
            stop = stopping()  # asked once: a signal from here on is for the next step
            if due or stop or step == config.steps:
                metrics.flush()
                save_state(folder, step, identity, network, optimiser, speed)
                draw_progress(folder / "progress.png", metrics)
                if saved is not None:
                    saved()
                last_save = time.monotonic()
            if stop:
                log.info(f"stopped by a signal after step {step}; the checkpoint is written")
                break
    seconds = time.monotonic() - began
    return Trained(network.cpu().eval(), scores, step, step == config.steps, seconds)
