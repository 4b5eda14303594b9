"""The training loop: straight down, resumable at any step, the same whatever interrupted it."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch.utils.data import DataLoader, Subset

from pipeline.cache.reader import CachedCase
from pipeline.cache.store import write_json
from pipeline.config import Config, canonical_json, digest
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.intensity import Intensity
from pipeline.labels import LabelSpace
from pipeline.log import Log
from pipeline.network import NetworkConfig
from pipeline.patches import Index3
from pipeline.student.augment import AugmentConfig
from pipeline.student.checkpoint import load_newest, save_training
from pipeline.student.dataset import PatchDataset, SamplingConfig, to_batch
from pipeline.student.network import CachedTap, StudentNetwork, TapKey, seeded_network
from pipeline.student.progress import Metrics, draw_progress
from pipeline.student.supervision import SupervisionConfig, batch_loss
from pipeline.student.validation import validate


class OptimiserConfig(Config):
    """How weights move. lr(step) depends on the absolute step alone, so resuming cannot bend it."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    momentum: float = Field(default=0.99, ge=0, lt=1, description="sgd, with Nesterov")
    schedule: Literal["cosine", "poly"] = "cosine"
    warmup: float = Field(default=0.02, ge=0, lt=1, description="share of the steps")
    clip_norm: float = Field(default=12.0, gt=0, description="largest gradient norm")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate: linear warm-up, then half a cosine, or (1 - t)^0.9 as nnU-Net's poly."""
        warm = self.warmup * steps
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        t = (step - warm) / max(1.0, steps - warm)
        if self.schedule == "poly":
            return float(self.lr * (1 - t) ** 0.9)
        return self.lr * 0.5 * (1 + math.cos(math.pi * t))


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
    workers: int = 0,
    pool_mb: int = 512,
    checkpoint_minutes: float = 10.0,
    resume: bool = True,
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
        workers: loader processes; changes speed only.
        pool_mb: decoded chunks kept in each of them; changes speed only.
        checkpoint_minutes: at most so much work is lost to a kill.
        resume: go on from the newest checkpoint; False refuses if there is one.

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
    optimiser = _optimiser(config.optimiser, network)
    identity = {"config": config.model_dump(mode="json"), "inputs": dict(inputs)}
    start = _restore(folder, identity, network, optimiser, log=log, resume=resume)
    metrics = Metrics(folder / "metrics.jsonl", keep_until=start)
    data = _dataset(config, space, cases, network if uses else None, pool_mb)
    loader = _loader(data, start, config, workers)
    keys = list(taps) if uses else []
    scores: dict[str, float | None] = dict(metrics.last_validation)
    step = start
    network.train()
    with _stop_signals() as stopping, log.progress("steps", config.steps) as advance:
        advance(steps=start)
        for collated in loader:
            fraction = step / config.steps
            for group in optimiser.param_groups:
                group["lr"] = config.optimiser.lr_at(step, config.steps)
            batch = to_batch(collated, keys, device)
            loss, terms = batch_loss(config.supervision, network, batch, fraction)
            _check_loss(loss, terms, step, collated["case"], folder)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.clip_norm)
            optimiser.step()
            step += 1
            metrics.add(
                step,
                loss=float(loss.detach()),
                terms=terms,
                lr=optimiser.param_groups[0]["lr"],
                gradient_norm=float(norm),
            )
            advance(f"loss {metrics.smooth_loss:.3f}")
            if step % config.validate_every == 0 or step == config.steps:
                scores = validate(network.network, validation, space, config, device)
                metrics.add_validation(step, scores)
                network.train()
            due = time.monotonic() - last_save > checkpoint_minutes * 60
            if due or stopping() or step == config.steps:
                metrics.flush()
                _save(folder, step, identity, network, optimiser)
                draw_progress(folder / "progress.png", metrics)
                last_save = time.monotonic()
            if stopping():
                log.info(f"stopped by a signal after step {step}; the checkpoint is written")
                break
    if step == start:
        metrics.flush()
    finished = step == config.steps
    seconds = time.monotonic() - began
    return Trained(network.cpu().eval(), scores, step, finished, seconds)


def run_digest(config: TrainingConfig, inputs: Mapping[str, Any]) -> str:
    """Digest of all that determines a training's outcome."""
    return digest({"config": config.model_dump(mode="json"), "inputs": dict(inputs)})


def _dataset(
    config: TrainingConfig,
    space: LabelSpace,
    cases: Sequence[CachedCase],
    network: StudentNetwork | None,
    pool_mb: int,
) -> PatchDataset:
    align: Index3 = network.tap_stride if network else (1, 1, 1)
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
        taps=list(network.cached) if network else [],
        patch=config.patch,
        align=align,
        intensity=config.intensity,
        sampling=config.sampling,
        augment=config.augment,
        batch_size=config.batch_size,
        num_steps=config.steps,
        seed=config.seed,
        pool_bytes=pool_mb * 1_000_000,
    )


def _loader(
    data: PatchDataset, start: int, config: TrainingConfig, workers: int
) -> DataLoader[dict[str, Any]]:
    """Samples from step `start` on. forkserver: zarr and Dask do not all survive a fork."""
    rest = Subset(data, range(start * config.batch_size, len(data)))
    return DataLoader(
        rest,
        batch_size=config.batch_size,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        # Of its own, or the loader would draw its base seed from the global stream.
        generator=torch.Generator().manual_seed(config.seed),
    )


def _optimiser(config: OptimiserConfig, network: torch.nn.Module) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def _save(
    folder: Path,
    step: int,
    identity: Mapping[str, Any],
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
) -> None:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    save_training(
        folder / "checkpoints",
        step,
        {
            "identity": canonical_json(identity),
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        },
    )


def _restore(
    folder: Path,
    identity: Mapping[str, Any],
    network: StudentNetwork,
    optimiser: torch.optim.Optimizer,
    *,
    log: Log,
    resume: bool,
) -> int:
    """Loads the newest checkpoint of this very run; returns the step to go on from."""
    state, complaints = load_newest(folder / "checkpoints")
    for complaint in complaints:
        log.warn(f"{complaint} The checkpoint before it is used.")
    if state is None:
        write_json(folder / "config.json", identity)
        torch.manual_seed(json.loads(canonical_json(identity))["config"]["seed"])
        return 0
    theirs, ours = json.loads(state["identity"]), json.loads(canonical_json(identity))
    differing = _differing(theirs, ours)
    if differing or not resume:
        reason = f"other settings: {'; '.join(differing[:6])}" if differing else "checkpoints"
        raise CheckpointError(
            f"this run was started with {reason}." if differing else "this run has checkpoints.",
            where=folder,
            fix="Use the same settings to go on, or another --run to start over.",
        )
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["rng"]["torch"])
    if torch.cuda.is_available() and len(state["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    step = int(state["step"])
    log.info(f"going on after step {step}")
    return step


def _differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in _differing(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [f"{prefix[:-1]} was {old}, now {new}"]


def _check_loss(
    loss: torch.Tensor, terms: Mapping[str, float], step: int, cases: Sequence[str], folder: Path
) -> None:
    if torch.isfinite(loss):
        return
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    raise PipelineError(
        f"the loss became NaN at step {step} in {', '.join(bad) or 'the sum'}, with cases "
        f"{', '.join(cases)}.",
        where=folder,
        fix="The last checkpoint is intact. Look at these cases, or lower optimiser.lr.",
    )


@contextmanager
def _stop_signals() -> Iterator[Any]:
    """SIGTERM and SIGUSR1 set a flag; the loop stops at the next step with a checkpoint."""
    caught: list[int] = []
    names = (signal.SIGTERM, signal.SIGUSR1)
    try:
        before = {name: signal.signal(name, lambda n, _: caught.append(n)) for name in names}
    except ValueError:  # not in the main thread: whoever started us handles signals
        before = {}
    try:
        yield lambda: bool(caught)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
