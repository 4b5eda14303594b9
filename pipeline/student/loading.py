"""Samples of a training as batches, made in this process or in loader processes."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipeline.cache.reader import CachedCase
from pipeline.cohort import Temperatures
from pipeline.errors import ConfigError, PipelineError
from pipeline.labels import LabelSpace
from pipeline.patches import Index3
from pipeline.student.dataset import PatchDataset, Remaining, collate
from pipeline.student.network import StudentNetwork
from pipeline.student.processes import ALONE, Processes
from pipeline.student.resume import live_as_long_as_the_loop
from pipeline.student.settings import TrainingConfig


def patches_of(
    config: TrainingConfig,
    space: LabelSpace,
    cases: Sequence[CachedCase],
    network: StudentNetwork,
    temperatures: Temperatures | None,
    pool_mb: int,
    processes: Processes = ALONE,
) -> PatchDataset:
    """The samples that this process makes, on the feature grids of the network's taps.

    Raises:
        ConfigError: the patch is not a whole number of feature cells, or the batch is not to be
            shared equally.
    """
    processes.share(config.batch_size)
    align: Index3 = network.tap_stride
    if any(n % a for n, a in zip(config.patch, align, strict=True)):
        raise ConfigError(
            f"patch {config.patch} is not a whole number of feature cells of {align} voxels.",
            where="patch",
            fix=f"Choose multiples of {align}.",
        )
    return PatchDataset(
        cases,
        space,
        supervision=config.supervision,
        taps=network.cached,
        patch=config.patch,
        align=align,
        intensity=config.intensity,
        sampling=config.sampling,
        augment=config.augment,
        batch_size=config.batch_size,
        num_steps=config.steps,
        seed=config.seed,
        rank=processes.rank,
        world_size=processes.size,
        temperatures=temperatures,
        pool_bytes=pool_mb * 1_000_000,
    )


def forks_of_a_server(*modules: str) -> ForkServerContext:
    """How loader processes start: zarr and Dask do not all survive a fork of a process that used
    them. The server has imported what they need and used nothing, so each starts at once.

    Args:
        modules: that it imports as well; too late if it runs already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    return context


def _server_of_loaders() -> ForkServerContext:
    """The server ignores Ctrl-C, and so does each loader from its first moment on: until one could
    say so itself, it would end with a traceback."""
    context = forks_of_a_server()
    if threading.current_thread() is not threading.main_thread():
        return context
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    return context


@contextmanager
def loaded_batches(
    data: PatchDataset,
    start: int,
    config: TrainingConfig,
    workers: int,
    processes: Processes = ALONE,
) -> Iterator[Iterator[dict[str, Any] | PipelineError]]:
    """This process's share of each batch, from step `start` on."""
    share = processes.share(config.batch_size)
    loader = DataLoader(
        Remaining(data, start * share),
        batch_size=share,
        num_workers=workers,
        multiprocessing_context=_server_of_loaders() if workers else None,
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
