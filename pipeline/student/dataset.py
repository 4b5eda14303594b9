"""Training samples: a pure function of (seed, step, index); no sampler or worker state.

The index counts within the batch of all processes together, so that their number changes nothing.
One spatial transform is drawn per sample and moves image, label, log-odds, regions and features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pipeline.cache.pool import POOL
from pipeline.cache.reader import CachedCase
from pipeline.cohort import Temperatures, known_organs
from pipeline.errors import ConfigError, PipelineError
from pipeline.intensity import Intensity
from pipeline.labels import IGNORE, LabelSpace
from pipeline.patches import Index3, Patch, patch_at
from pipeline.student.appearance import change_intensity
from pipeline.student.augment import (
    FEATURES_STAY,
    AugmentConfig,
    check_sides,
    draw_movement,
)
from pipeline.student.movement import Warp
from pipeline.student.network import CachedTap, TapKey
from pipeline.student.regions import read_regions, resampled_regions
from pipeline.student.sampling import Sampler, SamplingConfig
from pipeline.student.supervision import Batch, SupervisionConfig

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
