"""The training loop: straight down, resumable at any step, the same whatever interrupted it; one
step of it, and its validation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.cache.reader import CachedCase
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.errors import ConfigError, PipelineError, Stopped
from pipeline.log import Log
from pipeline.networks.by_name import pick_device
from pipeline.student.dataset import PatchDataset, loaded_batches, to_batch
from pipeline.student.distributed import ALONE, Processes
from pipeline.student.inference import StudentWindows
from pipeline.student.inputs import TrainingInputs
from pipeline.student.network import StudentNetwork, seeded_network
from pipeline.student.postprocessing import Rule, best_rule, candidates, dice_by_rule
from pipeline.student.resume import RunFolder, TrainingState, stop_signals
from pipeline.student.settings import TrainingConfig, build_optimiser
from pipeline.student.speed import Speed, TrainingExecution
from pipeline.student.supervision import Batch, batch_loss

_STEPS_PER_NOTE = 20  # what is not needed for the step is computed this seldom


@dataclass(frozen=True)
class Trained:
    """The outcome of a training.

    Attributes:
        network: with its last weights, on the CPU, in evaluation mode.
        validation_dice: per organ, of the last step; None where no validation case shows it.
        rules: which parts of an organ are better removed, by the same cases; empty of an unfinished
            training, and of one that keeps no student.
        step: steps that were made in all; fewer than asked for if it was stopped.
        signalled: a signal to stop came, be it in the last step: who has more to do shall not.
    """

    network: StudentNetwork
    validation_dice: Mapping[str, float | None]
    rules: Mapping[str, Rule]
    step: int
    steps: int
    signalled: bool

    @property
    def finished(self) -> bool:
        """Whether all steps were made."""
        return self.step == self.steps

    def stopped(self, where: object) -> Stopped:
        """What to tell of a training that is not finished."""
        return Stopped(
            f"stopped at step {self.step} of {self.steps}.",
            where=where,
            fix="Run the same command again: it goes on from there.",
        )


def train(
    config: TrainingConfig,
    inputs: TrainingInputs,
    run: RunFolder,
    execution: TrainingExecution,
    log: Log,
    processes: Processes = ALONE,
) -> Trained:
    """Trains, or goes on training, until `config.steps`.

    Args:
        inputs: what is read; no validation case is none too few.
        run: where checkpoints, metrics.jsonl and progress.png go.
        processes: that train together; `config.batch_size` is shared by them, the first writes.

    Raises:
        ConfigError: no case to train on, or what several processes cannot share.
        CheckpointError: the folder holds a run with other settings, or nothing readable.
        PipelineError: the loss became NaN, or a process failed; all of them end with it.
    """
    if not inputs.training:
        raise ConfigError(
            "there is no case to train on.",
            where=run.path,
            fix="Look at the splits in the registry, and at `pipeline status`.",
        )
    log = processes.log(log)
    state, data = processes.together(lambda: _begin(config, inputs, execution, log, processes))
    for remark in data.remarks():
        log.warn(remark)
    step = start = run.restore(state, log)
    learns = run.record is not None  # a student's file holds rules, no other one does
    network, last_save = state.network, time.monotonic()
    network.train()
    with (
        stop_signals(answered=processes.is_first) as stopping,
        run.followed(state, start, execution.loggers, log) as metrics,
        log.progress("steps", config.steps, done=start) as advance,
        loaded_batches(data, start, execution.workers) as loader,
    ):
        scores = processes.from_first(lambda: dict(metrics.history.last_validation))
        rules: dict[str, Rule] = {}
        for collated in metrics.batches(loader):
            line = _step_of_all(state, collated, step, run)
            step += 1
            metrics.add(step, **line)
            advance(metrics.note)
            if step % config.validate_every == 0 or step == config.steps:
                scores, rules = _validated(state, learns and step == config.steps)
                run.add_validation(state, step, scores)
                network.train()
            due = time.monotonic() - last_save > execution.checkpoint_minutes * 60
            # Asked once: a signal from here on is for the next step.
            stop, due = processes.any(stopping(), due and processes.is_first)
            if due or stop or step == config.steps:
                run.save(state, step)
                last_save = time.monotonic()
            if stop and step < config.steps:
                log.info(f"stopped by a signal after step {step}; the checkpoint is written")
                break
    if learns and step == start == config.steps:  # killed before its student was written
        _, rules = _validated(state, learns)
    return Trained(network.cpu().eval(), scores, rules, step, config.steps, stopping())


def _begin(
    config: TrainingConfig,
    inputs: TrainingInputs,
    execution: TrainingExecution,
    log: Log,
    processes: Processes,
) -> tuple[TrainingState, PatchDataset]:
    """The state before the first step, and the samples."""
    device = processes.device(pick_device(execution.device))
    network = seeded_network(config, len(inputs.space.organs), inputs.taps).to(device)
    processes.check_network(network)
    speed = Speed(execution.flags, device)
    speed.prepare(network, network.network, log)
    read = replace(inputs, taps=network.cached)
    data = PatchDataset(config, read, processes, execution.pool_bytes)
    optimiser = build_optimiser(config.optimiser, network)
    return TrainingState(config, inputs, network, optimiser, speed, processes), data


def _step_of_all(
    state: TrainingState, collated: dict[str, Any] | PipelineError, step: int, run: RunFolder
) -> dict[str, Any]:
    """`make_step` of a batch that every process could read; what is not finite in one of them ends
    all, naming step, term and the cases of the whole batch."""
    processes = state.processes
    processes.raise_any(collated if isinstance(collated, PipelineError) else None)
    assert not isinstance(collated, PipelineError)
    batch = to_batch(collated, list(state.network.cached), state.speed.device)
    try:
        return make_step(state, batch, step)
    except FloatingPointError as error:
        found = (str(error), list(collated["case"]))
        everywhere = processes.gathered(lambda: found)
        what = "; ".join(dict.fromkeys(text for text, _ in everywhere))
        names = ", ".join(name for _, share in everywhere for name in share)
        raise PipelineError(
            f"step {step + 1}, with cases {names}: {what}",
            where=run.path,
            fix="The last checkpoint is intact. Look at these cases, or lower optimiser.lr.",
        ) from error


def make_step(state: TrainingState, batch: Batch, step: int) -> dict[str, Any]:
    """One step of the optimiser; returns what is worth a line in metrics.jsonl.

    Raises:
        FloatingPointError: loss or gradient is not finite, of a loss with its terms; the weights
            are as they were before. In several processes it is raised in all.
    """
    config, network, optimiser = state.config, state.network, state.optimiser
    speed, processes = state.speed, state.processes
    lr = config.optimiser.lr_at(step, config.steps)
    for group in optimiser.param_groups:
        group["lr"] = lr
    told: dict[str, Any] = {}
    with speed.autocast():
        loss, terms = batch_loss(
            config.supervision, network, batch, step / config.steps,
            told if step % _STEPS_PER_NOTE == 0 else None,
        )  # fmt: skip
    value = float(loss.detach())
    if any(processes.any(not math.isfinite(value))):
        bad = [name for name, term in terms.items() if not math.isfinite(term)]
        raise FloatingPointError(f"the loss became NaN in {', '.join(bad) or 'the sum'}.")
    optimiser.zero_grad(set_to_none=True)
    # Before they are unscaled: so an overflow in one process makes all leave the step out.
    with processes.averaging(network.from_the_loss()):
        speed.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    speed.scaler.unscale_(optimiser)
    norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.clip_norm))
    if speed.is_lost(norm):
        optimiser.zero_grad(set_to_none=True)
        raise FloatingPointError("the gradient became NaN, although the loss is finite.")
    taken = speed.step(optimiser, norm)
    if "believed" in told:
        told["believed"] = dict(zip(state.inputs.space.organs, told["believed"], strict=True))
    found = {"loss": value, "terms": terms, "lr": lr, **told}
    return found | {"gradient_norm": norm if taken else None}


# Dice on labelled validation cases while training.


def _validated(
    state: TrainingState, learns: bool
) -> tuple[dict[str, float | None], dict[str, Rule]]:
    """Mean Dice per organ over the cases whose label shows it, None where none does; and if that is
    to be learnt, which parts of an organ are better removed: organs without a rule are left as they
    are."""
    config, inputs, speed = state.config, state.inputs, state.speed
    tried = _rules_to_try(inputs) if learns else {}
    network = state.network.network
    windows = StudentWindows(network, config.intensity, config.patch, speed.device, overlap=0.25)
    with speed.autocast():
        dice = validate(windows, inputs.validation, inputs.space, state.processes, tried)
    best = {organ: best_rule(rules, dice[organ]) for organ, rules in tried.items()}
    return mean_scores(dice), {organ: rule for organ, rule in best.items() if rule is not None}


def _rules_to_try(inputs: TrainingInputs) -> dict[str, list[Rule]]:
    volumes = {
        organ: [ml for case in inputs.validation if (ml := case.organ_ml(organ))]
        for organ in inputs.space.organs
    }
    return {organ: candidates(found) for organ, found in volumes.items() if found}


def validate(
    windows: StudentWindows,
    cases: Sequence[CachedCase],
    space: LabelSpace,
    processes: Processes = ALONE,
    tried: Mapping[str, Sequence[Rule]] | None = None,
) -> dict[str, list[list[float]]]:
    """Per organ, of each case whose label shows it: Dice as it is predicted, and by each rule that
    is tried.

    Each case is judged on the organs that it annotates; ignored voxels do not count. Processes
    share the cases; the numbers are those of one process, to the bit.
    """
    windows.network.eval()
    mine = cases[processes.rank :: processes.size]
    shares = processes.gathered(lambda: [_dice(windows, case, space, tried or {}) for case in mine])
    found: dict[str, list[list[float]]] = {organ: [] for organ in space.organs}
    for number in range(len(cases)):
        rank, of_rank = number % processes.size, number // processes.size
        for organ, dice in shares[rank][of_rank].items():
            found[organ].append(dice)
    return found


def mean_scores(dice: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float | None]:
    """Of what `validate` found, as it is predicted; None where no case shows the organ."""
    means = {o: np.mean([first for first, *_ in found]) for o, found in dice.items() if found}
    return {organ: round(float(means[organ]), 4) if organ in means else None for organ in dice}


def _dice(
    windows: StudentWindows,
    case: CachedCase,
    space: LabelSpace,
    tried: Mapping[str, Sequence[Rule]],
) -> dict[str, list[float]]:
    predicted = windows.logits(case.image()).argmax(axis=0)
    reference = space.to_classes(case.label())
    predicted[reference == IGNORE] = 0
    found = {}
    for organ in case.annotated:  # one mask at a time, for there may be many
        if organ in space.organs:
            number = space.index(organ) + 1
            theirs = reference == number
            if theirs.any():
                rules = tried.get(organ, ())
                found[organ] = dice_by_rule(predicted == number, theirs, rules, case.grid.voxel_ml)
    return found
