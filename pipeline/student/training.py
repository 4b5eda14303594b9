"""The training loop: straight down, resumable at any step, the same whatever interrupted it; one
step of it, and its validation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from pipeline.cache.reader import CachedCase
from pipeline.consensus.cohort import Temperatures
from pipeline.data.labels import IGNORE, Intensity, LabelSpace
from pipeline.errors import ConfigError, PipelineError
from pipeline.log import Log
from pipeline.student.dataset import PatchDataset, loaded_batches, to_batch
from pipeline.student.inference import predict_logits
from pipeline.student.inputs import TrainingInputs
from pipeline.student.loggers import RunLogger
from pipeline.student.network import CachedTap, StudentNetwork, TapKey, seeded_network
from pipeline.student.processes import ALONE, Processes
from pipeline.student.progress import draw_progress, followed
from pipeline.student.resume import (
    BestSoFar,
    Stateful,
    check_finite,
    random_state,
    restore_state,
    save_state,
    stop_signals,
)
from pipeline.student.settings import TrainingConfig, build_optimiser
from pipeline.student.speed import Speed, SpeedFlags
from pipeline.student.supervision import Batch, batch_loss

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
        read = TrainingInputs(cases, validation, space, inputs, network.cached, temperatures or {})
        return network, PatchDataset(config, read, processes, pool_mb * 1_000_000)

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
        loaded_batches(data, start, workers) as loader,
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


# One step of the optimiser.


def make_step(
    config: TrainingConfig,
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    speed: Speed,
    processes: Processes,
    step: int,
) -> dict[str, Any]:
    """One step of the optimiser; returns what is worth a line in metrics.jsonl.

    Raises:
        FloatingPointError: loss or gradient is not finite, of a loss with its terms; the weights
            are as they were before. In several processes it is raised in all.
    """
    lr = config.optimiser.lr_at(step, config.steps)
    for group in optimiser.param_groups:
        group["lr"] = lr
    with speed.autocast():
        loss, terms = batch_loss(config.supervision, network, batch, step / config.steps)
    value = float(loss.detach())
    if any(processes.any(not math.isfinite(value))):
        bad = [name for name, term in terms.items() if not math.isfinite(term)]
        raise FloatingPointError(f"the loss became NaN in {', '.join(bad) or 'the sum'}.")
    optimiser.zero_grad(set_to_none=True)
    speed.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    # Before they are unscaled: so an overflow in one process makes all leave the step out.
    processes.average_gradients(network)
    speed.scaler.unscale_(optimiser)
    norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.clip_norm))
    if speed.is_lost(norm):
        optimiser.zero_grad(set_to_none=True)
        raise FloatingPointError("the gradient became NaN, although the loss is finite.")
    taken = speed.step(optimiser, norm)
    found = {"loss": value, "terms": terms, "lr": lr}
    return found | {"gradient_norm": norm if taken else None}


# Dice on labelled validation cases while training.


class Settings(Protocol):
    """What of a training's configuration matters here."""

    @property
    def intensity(self) -> Intensity:
        """HU -> network units."""

    @property
    def patch(self) -> tuple[int, int, int]:
        """Window."""


def validate(
    network: nn.Module,
    cases: Sequence[CachedCase],
    space: LabelSpace,
    settings: Settings,
    device: torch.device,
    processes: Processes = ALONE,
) -> dict[str, float | None]:
    """Mean Dice per organ over the cases whose label shows it; None where none does.

    Each case is judged on the organs that it annotates; ignored voxels do not count. Processes
    share the cases; the means are those of one process, to the bit.
    """
    network.eval()
    mine = cases[processes.rank :: processes.size]
    shares = processes.gathered(
        lambda: [_scores(network, case, space, settings, device) for case in mine]
    )
    scores: dict[str, list[float]] = {organ: [] for organ in space.organs}
    for number in range(len(cases)):
        rank, of_rank = number % processes.size, number // processes.size
        for organ, score in shares[rank][of_rank].items():
            scores[organ].append(score)
    return {o: round(float(np.mean(found)), 4) if found else None for o, found in scores.items()}


def mean_dice(scores: Mapping[str, float | None]) -> float | None:
    """Over the organs that have a score; None if none has."""
    found = [score for score in scores.values() if score is not None]
    return sum(found) / len(found) if found else None


def _scores(
    network: nn.Module,
    case: CachedCase,
    space: LabelSpace,
    settings: Settings,
    device: torch.device,
) -> dict[str, float]:
    """Dice of one case per organ that its label shows."""
    logits = predict_logits(
        network, case.image(), settings.intensity, settings.patch, overlap=0.25, device=device
    )
    predicted = logits.argmax(axis=0)
    reference = space.to_classes(case.label())
    predicted[reference == IGNORE] = 0
    scores = {}
    for organ in case.annotated:
        if organ not in space.organs:
            continue
        number = space.index(organ) + 1
        theirs, ours = reference == number, predicted == number
        if theirs.any():
            both = 2.0 * np.count_nonzero(theirs & ours)
            scores[organ] = float(both / (np.count_nonzero(theirs) + np.count_nonzero(ours)))
    return scores
