"""Training samples: a pure function of (seed, step, rank, index); no sampler or worker state.

One spatial transform is drawn per sample and moves image, label, log-odds, regions and features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pipeline.cache.pool import POOL
from pipeline.cache.reader import CachedCase
from pipeline.cohort import Temperatures, compute, known_organs, lazy_consensus
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.intensity import Intensity
from pipeline.labels import IGNORE, LabelSpace
from pipeline.patches import Index3, Patch, patch_at
from pipeline.student.augment import AugmentConfig, change_intensity, draw_movement
from pipeline.student.network import TapKey
from pipeline.student.supervision import Batch, SupervisionConfig

AIR_HU = -1024


class SamplingConfig(Config):
    """Where patches are taken."""

    foreground: float = Field(
        default=0.67, ge=0, le=1, description="share of patches centred on an organ, organs equal"
    )
    organs_from: str = Field(
        default="labels_and_teachers",
        pattern="^(labels|labels_and_teachers)$",
        description="whether teachers, too, say where an unannotated organ may be",
    )


class PatchDataset(Dataset[dict[str, Any]]):
    """Patches of a cohort; item number `step * batch_share + index` of this process.

    Args:
        cases: to draw from, each equally often within its dataset, datasets equally often.
        space: the student's organs.
        supervision: decides what is read.
        taps: cached taps to read, and their channels F.
        patch: (D, H, W) voxels.
        align: patch origins are multiples of it, so that cached features follow exactly.
        intensity: HU -> network units.
        sampling: where patches are taken.
        augment: what is done to them.
        batch_size: samples per step, of all processes together.
        num_steps: length of the training.
        seed: of the run.
        rank: of this process; it makes samples `rank * batch_share` onwards of each batch.
        world_size: number of processes; batch_share = batch_size / world_size.
        temperatures: (teacher, organ) -> T of a calibrated supervision; empty for others.
        pool_bytes: decoded chunks kept per process; changes speed only.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        space: LabelSpace,
        *,
        supervision: SupervisionConfig,
        taps: Mapping[TapKey, int],
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
        self.space, self.supervision, self.taps = space, supervision, dict(taps)
        self.patch, self.align, self.intensity = patch, align, intensity
        self.sampling, self.augment = sampling, augment
        self.num_steps, self.seed, self.rank = num_steps, seed, rank
        self.batch_share = batch_size // world_size
        self.temperatures = dict(temperatures or {})
        self.pool_bytes = pool_bytes
        self._by_dataset: dict[str, list[CachedCase]] = {}
        for case in cases:
            self._by_dataset.setdefault(case.name.split("/")[0], []).append(case)

    def __len__(self) -> int:
        return self.num_steps * self.batch_share

    def __getitem__(self, item: int) -> dict[str, Any]:
        if POOL.max_bytes != self.pool_bytes:
            POOL.resize(self.pool_bytes)
        step, index = divmod(item, self.batch_share)
        index += self.rank * self.batch_share
        # By the number in the whole batch: how many processes make it changes no sample.
        rng = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self.seed, step, 0, index]))
        )
        datasets = sorted(self._by_dataset)
        cases = self._by_dataset[datasets[int(rng.integers(len(datasets)))]]
        case = cases[int(rng.integers(len(cases)))]
        shape = case.case.array("image").shape
        patch = patch_at(self._centre(case, shape, rng), self.patch, shape, self.align)
        arrays = self._read(case, patch)
        movement = draw_movement(self.augment, self.patch, rng)
        moved = {name: movement.apply(array) for name, array in arrays.items()}
        moved["image"] = change_intensity(moved["image"], self.augment, rng)
        sample: dict[str, Any] = {n: torch.from_numpy(a) for n, a in moved.items()}
        sample["classes"] = sample["classes"].long()
        organs = self.space.organs
        flags = [organ in case.annotated for organ in organs]
        sample["annotated"] = sample["known"] = torch.tensor(flags)
        if self.supervision.uses_teachers:
            known = known_organs(case, self.space, use_labels=self.supervision.labels_win)
            sample["known"] = torch.tensor([k in known for k in range(len(organs))])
        sample["case"] = case.name
        return sample

    def _centre(
        self, case: CachedCase, shape: tuple[int, ...], rng: np.random.Generator
    ) -> list[int]:
        """An organ's voxel, or any voxel."""
        anywhere = [int(rng.integers(n)) for n in shape]
        if rng.random() >= self.sampling.foreground:
            return anywhere
        candidates = self._centres(case)
        if not candidates:
            return anywhere
        chosen = candidates[sorted(candidates)[int(rng.integers(len(candidates)))]]
        return list(chosen[int(rng.integers(len(chosen)))])

    def _centres(self, case: CachedCase) -> dict[str, list[list[int]]]:
        labelled = case.case.attributes["centres"]
        found = {o: labelled[o] for o in self.space.organs if labelled.get(o)}
        if not self.supervision.uses_teachers or self.sampling.organs_from == "labels":
            return found
        for organ in self.space.organs:
            if organ in case.annotated:
                continue
            points = [
                point
                for teacher in case.experts.get(organ, ())
                for point in case.teachers[teacher].attributes["centres"][organ]
            ]
            if points:
                found[organ] = points
        return found

    def _read(self, case: CachedCase, patch: Patch) -> dict[str, npt.NDArray[Any]]:
        image = self.intensity.apply(case.image(patch, fill=AIR_HU))
        classes = self.space.to_classes(case.label(patch, fill=IGNORE))
        arrays: dict[str, npt.NDArray[Any]] = {"image": image[None], "classes": classes}
        if not self.supervision.uses_teachers:
            return arrays
        arrays |= self._read_regions(case, patch)
        cells = patch.coarsen(self.align)
        for number, ((teacher, tap), channels) in enumerate(self.taps.items()):
            if teacher in case.teachers:
                feature = case.features(teacher, tap, cells).astype(np.float32)
            else:
                feature = np.full((channels, *cells.shape), np.nan, dtype=np.float32)
            arrays[f"feature{number}"] = feature
        return arrays

    def _read_regions(self, case: CachedCase, patch: Patch) -> dict[str, npt.NDArray[Any]]:
        """Log-odds (NaN where nobody knows), organ regions and agreed background."""
        odds = np.full((len(self.space.organs), *patch.shape), np.nan, dtype=np.float32)
        organ = np.zeros(odds.shape, dtype=np.bool_)
        background = np.zeros(patch.shape, dtype=np.bool_)
        wins = self.supervision.labels_win
        if known_organs(case, self.space, use_labels=wins):
            regions, known = lazy_consensus(
                case,
                self.space,
                patch=patch,
                margin=self.supervision.margin,
                use_labels=wins,
                confidence=self.supervision.confidence,
                temperatures=self.temperatures,
            )
            odds[known], organ[known], background = compute(
                regions.log_odds, regions.organ, regions.background
            )
        return {"log_odds": odds, "organ": organ, "background": background}


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
        features={key: get(f"feature{n}") for n, key in enumerate(taps)} if with_teachers else {},
    )
