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
from dataclasses import replace
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
from pipeline.consensus.cohort import (
    RegionRules,
    compute,
    known_organs,
    lazy_consensus,
)
from pipeline.consensus.regions import Consensus, FloatArray, consensus
from pipeline.data.labels import IGNORE, LabelSpace
from pipeline.data.patches import Patch, patch_at
from pipeline.errors import ConfigError, PipelineError
from pipeline.student.augment import (
    FEATURES_STAY,
    Warp,
    change_intensity,
    check_sides,
    draw_movement,
)
from pipeline.student.inputs import TrainingInputs
from pipeline.student.network import TapKey, common_stride
from pipeline.student.processes import ALONE, Processes
from pipeline.student.resume import live_as_long_as_the_loop
from pipeline.student.sampling import Sampler
from pipeline.student.settings import TrainingConfig
from pipeline.student.supervision import Batch

AIR_HU = -1024


class PatchDataset(Dataset[dict[str, Any]]):
    """Patches of a cohort, those of one process.

    Of each batch, each process makes a contiguous share of `batch_share` samples; its item number
    `step * batch_share + i` is sample `rank * batch_share + i` of batch `step`, whatever the number
    of processes is. What of a patch lies outside a case is air, label 255, log-odds and features
    NaN. Patch origins are multiples of the cells of every cached tap.

    Args:
        config: of the training.
        inputs: to draw from and to read; see `Sampler`.
        processes: that share each batch; this one's samples are made.
        pool_bytes: decoded chunks kept per process; changes speed only.

    Raises:
        ConfigError: the batch cannot be shared evenly; the patch is not a whole number of feature
            cells; augmentation that is not legal for the organs (see `check_sides`) or for cached
            features.
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
        self.align = common_stride(inputs.taps.values())
        if any(n % a for n, a in zip(config.patch, self.align, strict=True)):
            raise ConfigError(
                f"patch {config.patch} is not a whole number of feature cells of {self.align} "
                "voxels.",
                where="patch",
                fix=f"Choose multiples of {self.align}.",
            )
        if inputs.taps and config.augment.moves_voxels:
            raise ConfigError(f"{FEATURES_STAY}.", where="augment", fix="Set features.weight to 0.")
        check_sides(config.augment, inputs.space)
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

    def __len__(self) -> int:
        return self.config.steps * self.batch_share

    def remarks(self) -> list[str]:
        """What a user should hear before the training starts; a sentence each."""
        return self._sampler.remarks(self.config.patch)

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
        patch = patch_at(centre, config.patch, grid.shape, self.align)
        movement = draw_movement(config.augment, config.patch, rng)
        arrays = self._read(case, patch, movement.warp(patch, grid.spacing_mm))
        moved = {name: movement.apply(array) for name, array in arrays.items()}
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
        image = self.config.intensity.apply(case.image(box, fill=AIR_HU))[None]
        classes = self.space.to_classes(case.label(box, fill=IGNORE))
        if warp is not None:
            image, classes = warp.linear(image), warp.nearest(classes)
        arrays: dict[str, npt.NDArray[Any]] = {"image": image, "classes": classes}
        if not self.config.supervision.uses_teachers:
            return arrays
        if warp is None:
            arrays["log_odds"] = read_log_odds(case, self.space, self.rules, patch)
        else:
            said = resampled_log_odds(case, self.space, self.rules, warp, classes)
            arrays["log_odds"] = said
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
        features={key: get(f"feature{n}") for n, key in enumerate(taps)} if with_teachers else {},
    )


# Log-odds of one training patch, over all organs; regions follow from them on the device.


def read_log_odds(
    case: CachedCase, space: LabelSpace, rules: RegionRules, patch: Patch
) -> FloatArray:
    """What teachers and labels say on a patch, read and combined in one go.

    Returns:
        float32 (K, D, H, W), NaN where nobody knows.
    """
    if not known_organs(case, space, labels_win=rules.labels_win):
        return _nobody_knows(space, patch.shape)
    regions, known = lazy_consensus(case, space, rules, patch)
    return _over_all_organs(regions, known, space)


def resampled_log_odds(
    case: CachedCase,
    space: LabelSpace,
    rules: RegionRules,
    warp: Warp,
    classes: npt.NDArray[np.uint8],
) -> FloatArray:
    """The same on a patch that an affine moved.

    The teachers' log-odds are resampled first, next to NaN to NaN. Then the label, resampled
    likewise, wins. So no label is contradicted.

    Args:
        case: open for reading.
        space: the student's organs.
        rules: of what teachers and labels say.
        warp: of the patch.
        classes: (D, H, W), the label of the moved patch.
    """
    known = known_organs(case, space, labels_win=rules.labels_win)
    if not known:
        return _nobody_knows(space, classes.shape)
    odds = np.full((len(known), *classes.shape), np.nan, dtype=np.float32)
    taught = known_organs(case, space, labels_win=False)
    if taught:
        said, _ = lazy_consensus(case, space, replace(rules, labels_win=False), warp.box)
        odds[[known.index(k) for k in taught]] = warp.linear(*compute(said.log_odds))
    annotated = [n for n, k in enumerate(known) if space.organs[k] in case.annotated]
    label = None
    if rules.labels_win and annotated:
        # Classes of all organs -> 1 + position among the known ones.
        among_known = LabelSpace({space.organs[k]: k + 1 for k in known}).to_classes(classes)
        label = da.from_array(among_known, chunks=-1, name=False)
    said = da.from_array(odds, chunks=-1, name=False)
    corrected = consensus(said, label, annotated, confidence=rules.confidence)
    return _over_all_organs(corrected, known, space)


def _over_all_organs(said: Consensus, known: list[int], space: LabelSpace) -> FloatArray:
    (log_odds,) = compute(said.log_odds)
    found = _nobody_knows(space, log_odds.shape[1:])
    found[known] = log_odds
    return found


def _nobody_knows(space: LabelSpace, shape: tuple[int, ...]) -> FloatArray:
    return np.full((len(space.organs), *shape), np.nan, dtype=np.float32)


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
