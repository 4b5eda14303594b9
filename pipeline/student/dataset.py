"""Training samples: a pure function of (seed, step, index); no sampler or worker state. Then
batches.

The index counts within the batch of all processes together, so that their number changes nothing.
One spatial transform is drawn per sample and moves image, label, log-odds, regions and features.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.cache.reader import POOL, CachedCase
from pipeline.consensus.cohort import RegionRules, compute, known_organs, lazy_patch
from pipeline.data.labels import IGNORE
from pipeline.data.patches import Index3, Patch, patch_at
from pipeline.errors import PipelineError
from pipeline.student.augment import Warp, change_intensity, check_sides, draw_movement
from pipeline.student.distributed import ALONE, Processes
from pipeline.student.inputs import TrainingInputs
from pipeline.student.network import TapKey
from pipeline.student.resume import live_as_long_as_the_loop
from pipeline.student.sampling import Sampler
from pipeline.student.settings import TrainingConfig
from pipeline.student.supervision import Batch

AIR_HU = -1024
BODY_HU = -500


class PatchDataset(Dataset[dict[str, Any]]):
    """Patches of a cohort, those of one process.

    Of each batch, each process makes a contiguous share of `batch_share` samples; its item number
    `step * batch_share + i` is sample `rank * batch_share + i` of batch `step`, whatever the number
    of processes is. What of a patch lies outside a case is air, label 255, log-odds and features
    NaN, and in no region. Features of a patch that was moved are NaN: those of a mirrored or
    scaled image are not the mirrored or scaled ones.

    Args:
        inputs: to draw from and to read; see `Sampler`.
        processes: that share each batch; this one's samples are made.
        pool_bytes: decoded chunks kept per process; changes speed only.

    Raises:
        GeometryError: a case is one slice, and the patch is thicker.
        ConfigError: the batch cannot be shared evenly, or augmentation that is not legal for the
            organs (see `check_sides`).
        CacheError: a unit whose attributes cannot be read.
    """

    def __init__(
        self,
        config: TrainingConfig,
        inputs: TrainingInputs,
        processes: Processes = ALONE,
        pool_bytes: int = 0,
    ) -> None:
        self.batch_share, self.rank = processes.share(config.batch_size), processes.rank
        check_sides(config.augment, inputs.space, config.patch)
        supervision = config.supervision
        self.config, self.space, self.taps = config, inputs.space, dict(inputs.taps)
        self.rules = RegionRules(
            supervision.margin, supervision.labels_win, supervision.confidence, inputs.temperatures
        )
        self.pool_bytes = pool_bytes
        self._sampler = Sampler(
            inputs.training,
            inputs.space.organs,
            config.sampling,
            use_teachers=supervision.uses_teachers,
        )
        self._sampler.check_patch(config.patch)

    def __len__(self) -> int:
        return self.config.steps * self.batch_share

    def remarks(self) -> list[str]:
        """What a user should hear before the training starts; a sentence each."""
        found = self._sampler.remarks(self.config.patch)
        if self.taps:
            augment, patch, rng = self.config.augment, self.config.patch, np.random.default_rng(0)
            still = np.mean([not draw_movement(augment, patch, rng).moves for _ in range(1000)])
            if still < 1:
                found.append(
                    f"features teach the patches that augmentation does not move: {still:.0%}."
                )
        return found

    def __getitem__(self, item: int) -> dict[str, Any]:
        if POOL.max_bytes != self.pool_bytes:
            POOL.resize(self.pool_bytes)
        config = self.config
        step, number = divmod(item, self.batch_share)
        index = self.rank * self.batch_share + number
        rng = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([config.seed, step, index]))
        )
        case, centre = self._sampler.draw(rng)
        grid = case.grid
        patch = patch_at(centre, config.patch, grid.shape)
        movement = draw_movement(config.augment, config.patch, rng)
        arrays = self._read(case, patch, movement.warp(patch, grid))
        moved = {name: movement.apply(array) for name, array in arrays.items()}
        moved |= self._features(case, patch, seen=not movement.moves)
        spacing_mm = movement.spacing_after(grid.spacing_mm)
        moved["image"] = change_intensity(moved["image"], config.augment, rng, spacing_mm)
        sample: dict[str, Any] = {n: torch.from_numpy(a) for n, a in moved.items()}
        sample["classes"] = sample["classes"].long()
        organs = self.space.organs
        flags = [organ in case.annotated for organ in organs]
        sample["annotated"] = sample["known"] = torch.tensor(flags)
        if config.supervision.uses_teachers:
            known = known_organs(case, self.space, labels_win=self.rules.labels_win)
            sample["known"] = torch.tensor([k in known for k in range(len(organs))])
        sample["case"] = case.name
        return sample

    def _read(
        self, case: CachedCase, patch: Patch, warp: Warp | None
    ) -> dict[str, npt.NDArray[Any]]:
        """All arrays on the patch; with an affine, those of the box it needs, resampled."""
        box = patch if warp is None else warp.box
        hu = case.image(box, fill=AIR_HU)
        image = self.config.intensity.apply(hu)[None]
        classes = self.space.to_classes(case.label(box, fill=IGNORE))
        if warp is not None:
            image, classes = warp.linear(image), warp.nearest(classes)
        arrays: dict[str, npt.NDArray[Any]] = {"image": image, "classes": classes}
        if not self.config.supervision.uses_teachers:
            return arrays
        if self.taps:  # a patch that is resampled has no features that it could matter to
            body = hu > BODY_HU if warp is None else np.zeros(patch.shape)
            arrays["body"] = body.astype(np.bool_)
        resample = None if warp is None else warp.linear
        lazy = lazy_patch(case, self.space, self.rules, box, classes, resample)
        (arrays["log_odds"],) = compute(lazy)
        return arrays

    def _features(
        self, case: CachedCase, patch: Patch, *, seen: bool
    ) -> dict[str, npt.NDArray[Any]]:
        """Of each tap (F, d, h, w), standardised; NaN without a unit, or if they are not seen."""
        arrays = {}
        for number, ((teacher, tap), cached) in enumerate(self.taps.items()):
            if seen and teacher in case.teachers:
                feature = cached.standardised(features_at(case, teacher, tap, patch, cached.stride))
            else:
                cells = [n // s for n, s in zip(patch.shape, cached.stride, strict=True)]
                feature = np.full((cached.channels, *cells), np.nan, dtype=np.float32)
            arrays[f"feature{number}"] = feature
        return arrays


class Remaining(Dataset[dict[str, Any] | PipelineError]):
    """The samples from a number on, in which an error is a value.

    An exception raised in a loader process reaches the loop as a text of tracebacks; returned, it
    arrives as what it was.
    """

    def __init__(self, data: PatchDataset, first: int) -> None:
        self._data, self._first = data, first

    def __len__(self) -> int:
        return len(self._data) - self._first

    def __getitem__(self, item: int) -> dict[str, Any] | PipelineError:
        try:
            return self._data[self._first + item]
        except PipelineError as error:
            return error


def collate(samples: list[dict[str, Any] | PipelineError]) -> dict[str, Any] | PipelineError:
    """Stacks samples to a batch; an error among them stands for the whole batch."""
    for sample in samples:
        if isinstance(sample, PipelineError):
            return sample
    batch: dict[str, Any] = default_collate(samples)
    return batch


def to_batch(collated: dict[str, Any], taps: Sequence[TapKey], device: torch.device) -> Batch:
    """A collated dictionary -> a `Batch` on the device."""

    def get(name: str) -> Tensor:
        tensor: Tensor = collated[name]
        return tensor.to(device, non_blocking=True)

    with_teachers = "log_odds" in collated
    return Batch(
        image=get("image"),
        classes=get("classes"),
        annotated=get("annotated"),
        known=get("known"),
        log_odds=get("log_odds") if with_teachers else None,
        body=get("body") if "body" in collated else None,
        features={key: get(f"feature{n}") for n, key in enumerate(taps)} if with_teachers else {},
    )


def features_at(
    case: CachedCase, teacher: str, tap: str, patch: Patch, stride: Index3
) -> npt.NDArray[np.float32]:
    """Cells (F, d, h, w) of a patch that begins at any voxel: linear between the cached ones on
    either side; next to NaN is NaN. The patch is a whole number of cells.
    """
    z, y, x = (a // s for a, s in zip(patch.start, stride, strict=True))
    into = [a % s / s for a, s in zip(patch.start, stride, strict=True)]
    d, h, w = (n // s + (f > 0) for n, s, f in zip(patch.shape, stride, into, strict=True))
    found = case.features(teacher, tap, Patch((z, y, x), (d, h, w))).astype(np.float32)
    for axis, share in enumerate(into, start=1):
        if share:
            before = (slice(None),) * axis
            lower, upper = found[(*before, slice(-1))], found[(*before, slice(1, None))]
            found = lower * np.float32(1 - share) + upper * np.float32(share)
    return found


# Samples of a training as batches, made in this process or in loader processes.


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
    data: PatchDataset, start: int, workers: int
) -> Iterator[Iterator[dict[str, Any] | PipelineError]]:
    """This process's share of each batch, from step `start` on."""
    loader = DataLoader(
        Remaining(data, start * data.batch_share),
        batch_size=data.batch_share,
        num_workers=workers,
        multiprocessing_context=_server_of_loaders() if workers else None,
        collate_fn=collate,
        worker_init_fn=live_as_long_as_the_loop,
        # Of its own, or the loader would draw its base seed from the global stream.
        generator=torch.Generator().manual_seed(data.config.seed),
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
