"""Training samples: a pure function of (seed, step, index); no sampler or worker state. Then
batches.

The index counts within the batch of all processes together, so that their number changes nothing.
One spatial transform is drawn per sample and moves image, label, log-odds, regions and features.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.cache.reader import POOL, CachedCase
from pipeline.consensus.cohort import Temperatures, compute, known_organs, lazy_consensus
from pipeline.consensus.regions import Consensus, consensus
from pipeline.data.labels import IGNORE, Intensity, LabelSpace
from pipeline.data.patches import Index3, Patch, patch_at
from pipeline.errors import ConfigError, PipelineError
from pipeline.student.augment import (
    FEATURES_STAY,
    AugmentConfig,
    Warp,
    change_intensity,
    check_sides,
    draw_movement,
)
from pipeline.student.network import CachedTap, StudentNetwork, TapKey
from pipeline.student.processes import ALONE, Processes
from pipeline.student.resume import live_as_long_as_the_loop
from pipeline.student.sampling import Sampler, SamplingConfig
from pipeline.student.settings import SupervisionConfig, TrainingConfig
from pipeline.student.supervision import Batch

AIR_HU = -1024


class PatchDataset(Dataset[dict[str, Any]]):
    """Patches of a cohort, those of one process.

    Of each batch, process `rank` of `world_size` makes a contiguous share of `batch_share` samples;
    its item number `step * batch_share + i` is sample `rank * batch_share + i` of batch `step`,
    whatever `world_size` is.

    Args:
        cases: to draw from; see `Sampler`.
        space: the student's organs.
        supervision: decides what is read.
        taps: cached taps to read.
        patch: (D, H, W) voxels. What of it lies outside a case is air, label 255, log-odds and
            features NaN, and in no region.
        align: patch origins are multiples of it, so that cells of every cached tap follow exactly.
        intensity: HU -> network units.
        sampling: where patches are taken.
        augment: what is done to them.
        batch_size: samples per step, of all processes together.
        num_steps: length of the training.
        seed: of the run.
        rank: of this process.
        world_size: number of processes.
        temperatures: (teacher, organ) -> T of a calibrated supervision; empty for others.
        pool_bytes: decoded chunks kept per process; changes speed only.

    Raises:
        ConfigError: the batch cannot be shared evenly; augmentation that is not legal for the
            organs (see `check_sides`) or for cached features.
        CacheError: a unit whose attributes cannot be read.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        space: LabelSpace,
        *,
        supervision: SupervisionConfig,
        taps: Mapping[TapKey, CachedTap],
        patch: Index3,
        align: Index3,
        intensity: Intensity,
        sampling: SamplingConfig,
        augment: AugmentConfig,
        batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        temperatures: Temperatures | None = None,
        pool_bytes: int = 0,
    ) -> None:
        if batch_size % world_size:
            raise ConfigError(
                f"a batch of {batch_size} cannot be shared evenly by {world_size} processes.",
                where="training.batch_size",
                fix=f"Choose a multiple of {world_size}, or another number of processes.",
            )
        if taps and augment.moves_voxels:
            raise ConfigError(f"{FEATURES_STAY}.", where="augment", fix="Set features.weight to 0.")
        check_sides(augment, space)
        self.space, self.supervision, self.taps = space, supervision, dict(taps)
        self.patch, self.align, self.intensity = patch, align, intensity
        self.augment = augment
        self.batch_share, self.rank = batch_size // world_size, rank
        self.num_steps, self.seed = num_steps, seed
        self.temperatures = dict(temperatures or {})
        self.pool_bytes = pool_bytes
        self._teachers = sorted({teacher for case in cases for teacher in case.teachers})
        self._sampler = Sampler(
            cases, space.organs, sampling, use_teachers=supervision.uses_teachers
        )

    def __len__(self) -> int:
        return self.num_steps * self.batch_share

    def remarks(self) -> list[str]:
        """What a user should hear before the training starts; a sentence each."""
        return self._sampler.remarks(self.patch)

    def __getitem__(self, item: int) -> dict[str, Any]:
        if POOL.max_bytes != self.pool_bytes:
            POOL.resize(self.pool_bytes)
        step, number = divmod(item, self.batch_share)
        index = self.rank * self.batch_share + number
        rng = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.seed, step, index]))
        )
        case, centre = self._sampler.draw(rng)
        grid = case.grid
        patch = patch_at(centre, self.patch, grid.shape, self.align)
        movement = draw_movement(self.augment, self.patch, rng)
        arrays = self._read(case, patch, movement.warp(patch, grid.spacing_mm))
        moved = {name: movement.apply(array) for name, array in arrays.items()}
        spacing_mm = movement.spacing_after(grid.spacing_mm)
        moved["image"] = change_intensity(moved["image"], self.augment, rng, spacing_mm)
        sample: dict[str, Any] = {n: torch.from_numpy(a) for n, a in moved.items()}
        sample["classes"] = sample["classes"].long()
        organs = self.space.organs
        flags = [organ in case.annotated for organ in organs]
        sample["annotated"] = sample["known"] = torch.tensor(flags)
        if self.supervision.uses_teachers:
            known = known_organs(case, self.space, use_labels=self.supervision.labels_win)
            sample["known"] = torch.tensor([k in known for k in range(len(organs))])
            if self.supervision.uses_experts:
                sample["experts"] = self._experts(case, known)
        sample["case"] = case.name
        return sample

    def _experts(self, case: CachedCase, known: Sequence[int]) -> Tensor:
        """Which teacher speaks of which organs, bool (I, K); a known organ without an expert here
        is the label's, and counts as a teacher of that organ alone.
        """
        who = [case.experts.get(organ, ()) for organ in self.space.organs]
        by_teacher = torch.tensor([[t in w for w in who] for t in self._teachers], dtype=torch.bool)
        by_label = torch.tensor([k in known and not w for k, w in enumerate(who)])
        return torch.cat([by_teacher.reshape(-1, len(who)), torch.diag(by_label)])

    def _read(
        self, case: CachedCase, patch: Patch, warp: Warp | None
    ) -> dict[str, npt.NDArray[Any]]:
        """All arrays on the patch; with an affine, those of the box it needs, resampled."""
        box = patch if warp is None else warp.box
        image = self.intensity.apply(case.image(box, fill=AIR_HU))[None]
        classes = self.space.to_classes(case.label(box, fill=IGNORE))
        if warp is not None:
            image, classes = warp.linear(image), warp.nearest(classes)
        arrays: dict[str, npt.NDArray[Any]] = {"image": image, "classes": classes}
        if not self.supervision.uses_teachers:
            return arrays
        how = case, self.space, self.supervision, self.temperatures
        if warp is None:
            arrays |= read_regions(*how, patch)
        else:
            arrays |= resampled_regions(*how, warp, classes)
        for number, ((teacher, tap), cached) in enumerate(self.taps.items()):
            cells = patch.coarsen(cached.stride)
            if teacher in case.teachers:
                feature = case.features(teacher, tap, cells).astype(np.float32)
            else:
                feature = np.full((cached.channels, *cells.shape), np.nan, dtype=np.float32)
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
        organ=get("organ") if with_teachers else None,
        background=get("background") if with_teachers else None,
        experts=get("experts") if "experts" in collated else None,
        features={key: get(f"feature{n}") for n, key in enumerate(taps)} if with_teachers else {},
    )


# Log-odds, organ regions and agreed background of one training patch, over all organs.

Arrays = dict[str, npt.NDArray[Any]]


def read_regions(
    case: CachedCase,
    space: LabelSpace,
    supervision: SupervisionConfig,
    temperatures: Temperatures,
    patch: Patch,
) -> Arrays:
    """What teachers and labels say on a patch, read and combined in one go.

    Returns:
        log_odds: float32 (K, D, H, W), NaN where nobody knows; organ: bool (K, D, H, W), the organ
        regions; background: bool (D, H, W), background as far as anybody speaks.
    """
    if not known_organs(case, space, use_labels=supervision.labels_win):
        return _nobody_knows(space, patch.shape)
    regions, known = lazy_consensus(
        case,
        space,
        patch=patch,
        margin=supervision.margin,
        use_labels=supervision.labels_win,
        confidence=supervision.confidence,
        temperatures=temperatures,
    )
    return _over_all_organs(regions, known, space)


def resampled_regions(
    case: CachedCase,
    space: LabelSpace,
    supervision: SupervisionConfig,
    temperatures: Temperatures,
    warp: Warp,
    classes: npt.NDArray[np.uint8],
) -> Arrays:
    """The same on a patch that an affine moved.

    The teachers' log-odds are resampled first, next to NaN to NaN. Then the label, resampled
    likewise, wins, and the regions are formed. So they are the regions of the log-odds that stand
    beside them, and no label is contradicted.

    Args:
        case: open for reading.
        space: the student's organs.
        supervision: margin, and how labels win.
        temperatures: as in `lazy_consensus`.
        warp: of the patch.
        classes: (D, H, W), the label of the moved patch.
    """
    known = known_organs(case, space, use_labels=supervision.labels_win)
    if not known:
        return _nobody_knows(space, classes.shape)
    odds = np.full((len(known), *classes.shape), np.nan, dtype=np.float32)
    taught = known_organs(case, space, use_labels=False)
    if taught:
        said, _ = lazy_consensus(
            case, space, patch=warp.box, use_labels=False, temperatures=temperatures
        )
        odds[[known.index(k) for k in taught]] = warp.linear(*compute(said.log_odds))
    annotated = [n for n, k in enumerate(known) if space.organs[k] in case.annotated]
    label = None
    if supervision.labels_win and annotated:
        # Classes of all organs -> 1 + position among the known ones.
        among_known = LabelSpace({space.organs[k]: k + 1 for k in known}).to_classes(classes)
        label = da.from_array(among_known, chunks=-1, name=False)
    regions = consensus(
        da.from_array(odds, chunks=-1, name=False),
        label,
        annotated,
        margin=supervision.margin,
        confidence=supervision.confidence,
    )
    return _over_all_organs(regions, known, space)


def _over_all_organs(regions: Consensus, known: list[int], space: LabelSpace) -> Arrays:
    log_odds, organ, background = compute(regions.log_odds, regions.organ, regions.unclaimed)
    found = _nobody_knows(space, background.shape)
    found["log_odds"][known], found["organ"][known] = log_odds, organ
    return {**found, "background": background}


def _nobody_knows(space: LabelSpace, shape: tuple[int, ...]) -> Arrays:
    all_organs = (len(space.organs), *shape)
    return {
        "log_odds": np.full(all_organs, np.nan, dtype=np.float32),
        "organ": np.zeros(all_organs, dtype=np.bool_),
        "background": np.zeros(shape, dtype=np.bool_),
    }


# Samples of a training as batches, made in this process or in loader processes.


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
