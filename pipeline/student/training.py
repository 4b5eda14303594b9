"""The training loop: straight down, resumable at any step, the same whatever interrupted it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.cache.reader import CachedCase
from pipeline.cohort import Temperatures
from pipeline.errors import ConfigError, PipelineError
from pipeline.labels import LabelSpace
from pipeline.log import Log
from pipeline.student.dataset import PatchDataset, to_batch
from pipeline.student.loading import loaded_batches, patches_of
from pipeline.student.loggers.run_logger import RunLogger
from pipeline.student.network import CachedTap, StudentNetwork, TapKey, seeded_network
from pipeline.student.optimiser import build_optimiser
from pipeline.student.picture import draw_progress
from pipeline.student.processes import ALONE, Processes
from pipeline.student.progress import followed
from pipeline.student.resume import (
    BestSoFar,
    Stateful,
    check_finite,
    random_state,
    restore_state,
    save_state,
    stop_signals,
)
from pipeline.student.settings import TrainingConfig
from pipeline.student.speed import Speed, SpeedFlags
from pipeline.student.step import make_step
from pipeline.student.validation import mean_dice, validate

KeepBest = Callable[[nn.Module, int, Mapping[str, float | None]], None]


@dataclass(frozen=True)
class Trained:
    """The outcome of a training.

    Attributes:
        network: with its last weights, on the CPU, in evaluation mode.
        validation_dice: per organ, of the last step; None where no validation case shows it.
        step: steps that were made in all; fewer than asked for if it was stopped.
        finished: whether all steps were made.
        seconds: of this run of the program.
        signalled: a signal to stop came, be it in the last step: who has more to do shall not.
    """

    network: StudentNetwork
    validation_dice: Mapping[str, float | None]
    step: int
    finished: bool
    seconds: float
    signalled: bool


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
    processes: Processes = ALONE,
    saved: Callable[[], None] | None = None,
    keep_best: KeepBest | None = None,
    name: str = "",
    loggers: Sequence[RunLogger] = (),
    flags: SpeedFlags | None = None,
    pictures: bool = True,
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
        processes: that train together; `config.batch_size` is shared by them, the first writes.
        saved: called whenever a checkpoint has been written, in the first process.
        keep_best: called with network, step and Dice per organ whenever the mean of these is
            higher than ever, in the first process.
        name: of the run, for people; by default the folder's.
        loggers: who is told beside metrics.jsonl, by the first process.
        flags: precision, memory format, compiling; changes speed and rounding.
        pictures: draw progress.png beside each checkpoint.

    Raises:
        ConfigError: no case to train on, or what several processes cannot share.
        CheckpointError: the folder holds a run with other settings, or nothing readable.
        PipelineError: the loss became NaN, or a process failed; all of them end with it.
    """
    if not cases:
        raise ConfigError(
            "there is no case to train on.",
            where=folder,
            fix="Look at the splits in the registry, and at `pipeline status`.",
        )
    began = last_save = time.monotonic()
    log = processes.log(log)
    speed = Speed(flags, device)

    def built() -> tuple[StudentNetwork, PatchDataset]:
        network = _network(config, space, taps).to(device)
        processes.check_network(network)
        speed.prepare(network, network.network, log)
        return network, patches_of(config, space, cases, network, temperatures, pool_mb, processes)

    network, data = processes.together(built)
    for remark in data.remarks():
        log.warn(remark)
    optimiser = build_optimiser(config.optimiser, network)
    best = BestSoFar()
    parts: dict[str, Stateful] = {
        "network": network, "optimiser": optimiser, "speed": speed, "best": best,
    }  # fmt: skip
    identity = {"config": config.model_dump(mode="json"), "inputs": dict(inputs)}
    step = start = restore_state(
        folder, identity, parts,
        seed=config.seed, log=log, resume=resume, device=device, processes=processes,
    )  # fmt: skip
    if speed.resumed_flags != speed.flags:
        log.warn(
            f"the run was trained with {speed.resumed_flags} and goes on with {speed.flags}: not "
            "bit for bit what it would have been."
        )

    def validated() -> None:
        if best.beaten_by(mean_dice(scores)) and keep_best is not None:
            check_finite(network.state_dict(), folder, step)
            keep_best(network.network, step, scores)
        metrics.add_validation(step, scores)
        if pictures and metrics.picture_is_old:
            draw_progress(folder / "progress.png", metrics, space.ids)

    def save(rng: Sequence[Mapping[str, Any]]) -> None:
        metrics.flush()
        save_state(folder, step, identity, parts, rng)
        if pictures:
            draw_progress(folder / "progress.png", metrics, space.ids)
        if saved is not None:
            saved()

    network.train()
    with (
        stop_signals(aloud=processes.is_first) as stopping,
        processes.folder_to_write(folder) as written,
        ExitStack() as following,
        log.progress("steps", config.steps, done=start) as advance,
        loaded_batches(data, start, config, workers, processes) as loader,
    ):
        followers = followed(
            written, identity["config"], resumed_from=start, batch_size=config.batch_size,
            warn=log.warn, name=name, loggers=loggers if processes.is_first else (),
        )  # fmt: skip
        metrics = processes.together(lambda: following.enter_context(followers))
        scores = processes.from_first(lambda: dict(metrics.last_validation))
        for collated in metrics.batches(loader):
            processes.raise_any(collated if isinstance(collated, PipelineError) else None)
            assert not isinstance(collated, PipelineError)
            batch = to_batch(collated, list(network.cached), device)
            try:
                line = make_step(config, network, optimiser, batch, speed, processes, step)
            except FloatingPointError as error:
                raise _not_finite(error, step + 1, collated["case"], folder, processes) from error
            metrics.add(step + 1, **line)
            step += 1
            advance(metrics.note)
            if step % config.validate_every == 0 or step == config.steps:
                with speed.autocast():
                    scores = validate(network.network, validation, space, config, device, processes)
                processes.from_first(validated)
                network.train()
            due = processes.is_first and time.monotonic() - last_save > checkpoint_minutes * 60
            # Asked once: a signal from here on is for the next step.
            stop, due = processes.any(stopping(), due)
            if due or stop or step == config.steps:
                states = processes.gathered(lambda: random_state(device))
                processes.from_first(partial(save, states))
                last_save = time.monotonic()
            if stop and step < config.steps:
                log.info(f"stopped by a signal after step {step}; the checkpoint is written")
                break
    seconds = time.monotonic() - began
    return Trained(
        network.cpu().eval(), scores, step, step == config.steps, seconds, signalled=stopping()
    )


def _network(
    config: TrainingConfig, space: LabelSpace, taps: Mapping[TapKey, CachedTap]
) -> StudentNetwork:
    uses = config.supervision.uses_features
    return seeded_network(
        config.network,
        len(space.organs),
        seed=config.seed,
        patch=config.patch,
        head=config.supervision.head,
        taps=config.supervision.features.student_taps if uses else (),
        cached=taps if uses else {},
        deep_supervision=config.deep_supervision,
    )


def _not_finite(
    error: FloatingPointError, step: int, cases: Sequence[str], folder: Path, processes: Processes
) -> PipelineError:
    """Names step, term and the cases of the whole batch; asked of all processes."""
    told = processes.gathered(lambda: (str(error), list(cases)))
    says = "; ".join(dict.fromkeys(text for text, _ in told))
    names = ", ".join(name for _, share in told for name in share)
    return PipelineError(
        f"step {step}, with cases {names}: {says}",
        where=folder,
        fix="The last checkpoint is intact. Look at these cases, or lower optimiser.lr.",
    )
