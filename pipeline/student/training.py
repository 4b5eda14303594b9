"""The training loop: straight down, resumable at any step, the same whatever interrupted it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader

from pipeline.cache.reader import CachedCase
from pipeline.cohort import Temperatures
from pipeline.config import Config, digest
from pipeline.errors import ConfigError, PipelineError
from pipeline.intensity import Intensity
from pipeline.labels import LabelSpace
from pipeline.log import Log
from pipeline.network import NetworkConfig
from pipeline.patches import Index3
from pipeline.student.augment import AugmentConfig
from pipeline.student.dataset import PatchDataset, Remaining, SamplingConfig, collate, to_batch
from pipeline.student.network import CachedTap, StudentNetwork, TapKey, seeded_network
from pipeline.student.optimiser import OptimiserConfig, build_optimiser
from pipeline.student.progress import Metrics, draw_progress
from pipeline.student.resume import (
    live_as_long_as_the_loop,
    restore_state,
    save_state,
    stop_signals,
)
from pipeline.student.supervision import Batch, SupervisionConfig, batch_loss
from pipeline.student.validation import validate


class TrainingConfig(Config):
    """Everything about a training that changes its numbers."""

    supervision: SupervisionConfig = Field(default_factory=SupervisionConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    intensity: Intensity = Field(default_factory=Intensity)
    patch: tuple[int, int, int] = Field(default=(96, 96, 96), description="voxels z, y, x")
    batch_size: int = Field(default=2, ge=1)
    steps: int = Field(default=20_000, ge=1)
    seed: int = Field(default=0, ge=0)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optimiser: OptimiserConfig = Field(default_factory=OptimiserConfig)
    validate_every: int = Field(default=1000, ge=1, description="steps")

    @model_validator(mode="after")
    def _legal(self) -> TrainingConfig:
        if self.augment.moves_voxels and self.supervision.uses_features:
            raise ValueError(
                "flips and rotations are not legal with cached features (the features of a "
                "mirrored image are not the mirrored features): set augment.flip_axes to [] and "
                "augment.rotate to false, or supervision.features.weight to 0"
            )
        return self


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
        tap=config.supervision.features.student_tap if uses else "",
        cached=taps if uses else {},
    ).to(device)
    optimiser = build_optimiser(config.optimiser, network)
    data = _dataset(config, space, cases, network, temperatures, pool_mb)
    identity = {"config": config.model_dump(mode="json"), "inputs": dict(inputs)}
    step = start = restore_state(
        folder, identity, network, optimiser, seed=config.seed, log=log, resume=resume
    )
    metrics = Metrics(folder / "metrics.jsonl", keep_until=start)
    scores: dict[str, float | None] = dict(metrics.last_validation)
    network.train()
    with (
        stop_signals() as stopping,
        log.progress("steps", config.steps) as advance,
        _loaded(data, start, config, workers) as loader,
    ):
        advance(steps=start)
        for collated in loader:
            if isinstance(collated, PipelineError):
                raise collated
            batch = to_batch(collated, list(network.cached), device)
            try:
                metrics.add(step + 1, **_make_step(config, network, optimiser, batch, step))
            except FloatingPointError as error:
                metrics.flush()
                raise PipelineError(
                    f"step {step + 1}, with cases {', '.join(collated['case'])}: {error}",
                    where=folder,
                    fix="The last checkpoint is intact. Look at these cases, or lower "
                    "optimiser.lr.",
                ) from error
            step += 1
            advance(f"loss {metrics.smooth_loss:.3f}")
            if step % config.validate_every == 0 or step == config.steps:
                scores = validate(network.network, validation, space, config, device)
                metrics.add_validation(step, scores)
                network.train()
            due = time.monotonic() - last_save > checkpoint_minutes * 60
            stop = stopping()  # asked once: a signal from here on is for the next step
            if due or stop or step == config.steps:
                metrics.flush()
                save_state(folder, step, identity, network, optimiser)
                draw_progress(folder / "progress.png", metrics)
                if saved is not None:
                    saved()
                last_save = time.monotonic()
            if stop:
                log.info(f"stopped by a signal after step {step}; the checkpoint is written")
                break
    seconds = time.monotonic() - began
    return Trained(network.cpu().eval(), scores, step, step == config.steps, seconds)


def run_digest(config: TrainingConfig, inputs: Mapping[str, Any]) -> str:
    """Digest of all that determines a training's outcome."""
    return digest({"config": config.model_dump(mode="json"), "inputs": dict(inputs)})


def _make_step(
    config: TrainingConfig,
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    step: int,
) -> dict[str, Any]:
    """One step of the optimiser; returns what is worth a line in metrics.jsonl.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are as they were before.
    """
    lr = config.optimiser.lr_at(step, config.steps)
    for group in optimiser.param_groups:
        group["lr"] = lr
    loss, terms = batch_loss(config.supervision, network, batch, step / config.steps)
    value = float(loss.detach())
    if not math.isfinite(value):
        bad = [name for name, term in terms.items() if not math.isfinite(term)]
        raise FloatingPointError(f"the loss became NaN in {', '.join(bad) or 'the sum'}.")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.clip_norm))
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient became NaN, although the loss is finite.")
    optimiser.step()
    return {"loss": value, "terms": terms, "lr": lr, "gradient_norm": norm}


def _dataset(
    config: TrainingConfig,
    space: LabelSpace,
    cases: Sequence[CachedCase],
    network: StudentNetwork,
    temperatures: Temperatures | None,
    pool_mb: int,
) -> PatchDataset:
    align: Index3 = network.tap_stride
    if any(n % a for n, a in zip(config.patch, align, strict=True)):
        raise ConfigError(
            f"patch {config.patch} is not a whole number of feature cells of {align} voxels.",
            where="patch",
            fix="Choose multiples.",
        )
    return PatchDataset(
        cases,
        space,
        supervision=config.supervision,
        taps={key: tap.channels for key, tap in network.cached.items()},
        patch=config.patch,
        align=align,
        intensity=config.intensity,
        sampling=config.sampling,
        augment=config.augment,
        batch_size=config.batch_size,
        num_steps=config.steps,
        seed=config.seed,
        temperatures=temperatures,
        pool_bytes=pool_mb * 1_000_000,
    )


@contextmanager
def _loaded(
    data: PatchDataset, start: int, config: TrainingConfig, workers: int
) -> Iterator[Iterator[dict[str, Any] | PipelineError]]:
    """Batches from step `start` on. forkserver: zarr and Dask do not all survive a fork."""
    rest = Remaining(data, start * config.batch_size)
    loader = DataLoader(
        rest,
        batch_size=config.batch_size,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        collate_fn=collate,
        worker_init_fn=live_as_long_as_the_loop,
        # Of its own, or the loader would draw its base seed from the global stream.
        generator=torch.Generator().manual_seed(config.seed),
    )
    batches = iter(loader)
    try:
        yield batches
    finally:
        # Loader processes end with their iterator. An error's traceback would keep it alive, and
        # this process would wait for them for ever.
        shut_down = getattr(batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
