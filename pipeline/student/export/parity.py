"""How far an exported student is from the student itself, on a case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.volume import Volume
from pipeline.errors import PipelineError
from pipeline.networks.windows import first_output
from pipeline.student.checkpoint import StudentRecord
from pipeline.student.inference import StudentWindows, running_argmax


class ParityError(PipelineError):
    """An exported student that says something else than the student: it is not written."""


class Tolerance(Config):
    """What an exported student may differ by."""

    max_logit_difference: float = Field(
        default=1e-3, ge=0, description="of any logit of any window"
    )
    max_differing_fraction: float = Field(
        default=1e-4, ge=0, le=1,
        description="voxels whose label differs, of those that either label map gives an organ",
    )  # fmt: skip
    bundle_max_differing_fraction: float = Field(
        default=0.05, ge=0, le=1,
        description="the same for a bundle that MONAI runs on an image of another grid: it places "
        "the student grid up to a quarter of its voxels elsewhere",
    )  # fmt: skip


@dataclass(frozen=True)
class Parity:
    """Two label maps of one case, compared.

    Attributes:
        organ_voxels: that either map gives an organ.
        dice: organ -> Dice of the two maps; None where neither has it.
        max_logit_difference: of any logit of any window; None where logits were not compared.
    """

    voxels: int
    organ_voxels: int
    differing_voxels: int
    dice: Mapping[str, float | None]
    max_logit_difference: float | None = None

    @property
    def differing_fraction(self) -> float:
        """Of the voxels that either map gives an organ; 0 where there are none."""
        return self.differing_voxels / self.organ_voxels if self.organ_voxels else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "differing_fraction": self.differing_fraction}

    def check(self, what: str, max_fraction: float, max_logit: float) -> None:
        """Refuses what is worse than a tolerance."""
        wrong = []
        if self.differing_fraction > max_fraction:
            wrong.append(
                f"{self.differing_voxels} of {self.organ_voxels} organ voxels differ "
                f"({self.differing_fraction:.2g}; tolerated {max_fraction:g})"
            )
        logit = self.max_logit_difference
        if logit is not None and not logit <= max_logit:  # NaN is no parity
            wrong.append(f"logits differ by up to {logit:.3g} (tolerated {max_logit:g})")
        if wrong:
            raise ParityError(
                f"it does not say what the student says: {'; '.join(wrong)}. Nothing was written.",
                where=what,
                fix="Use another --format, or check on another image; a student of few steps "
                "hangs on fractions of a voxel. `tolerance` in the settings says what is accepted.",
            )


class _SideBySide(nn.Module):
    """Two networks as one, their channels one after the other; keeps their largest difference."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other
        self.max_difference = 0.0

    def forward(self, image: Tensor) -> Tensor:
        one, other = (first_output(n(image)).float() for n in (self.one, self.other))
        if one.shape != other.shape:
            raise ParityError(
                f"it gives {tuple(other.shape)}, the student {tuple(one.shape)}.",
                where="the exported network",
                fix="Use another --format.",
            )
        difference = float((one - other).abs().max())
        # Python's max passes over a NaN that comes second.
        self.max_difference = float(np.maximum(self.max_difference, difference))
        return torch.cat([one, other], dim=1)


def compare_networks(
    network: nn.Module, exported: nn.Module, image: Volume, record: StudentRecord, *, overlap: float
) -> Parity:
    """Both networks in one pass over a case, on the CPU, one window at a time.

    Args:
        exported: (N, 1, D, H, W) -> as many logits as the student's.
        image: int16 HU on any grid.

    Raises:
        ParityError: other numbers of channels.
    """
    both = _SideBySide(network, exported)
    half = len(record.organs) + 1
    count = LabelCount(record)
    windows = StudentWindows(both, record.intensity, record.patch, overlap=overlap)
    for _, logits in windows.rows(image, record.spacing_mm):
        count.add(running_argmax(iter(logits[:half])), running_argmax(iter(logits[half:])))
    return count.parity(both.max_difference)


class LabelCount:
    """Counts what two label maps have in common, part by part."""

    def __init__(self, record: StudentRecord) -> None:
        self._organs = record.label_space.organs
        # Rows: the student's class; columns: the other's.
        self._table = np.zeros((len(self._organs) + 1,) * 2, dtype=np.int64)

    def add(self, ours: npt.NDArray[np.uint8], theirs: npt.NDArray[np.uint8]) -> None:
        """Classes 0 .. K of the same voxels, any shape."""
        size = len(self._table)
        pairs = ours.astype(np.int64) * size + theirs
        self._table += np.bincount(pairs.ravel(), minlength=size * size).reshape(size, size)

    def parity(self, max_logit_difference: float | None = None) -> Parity:
        """What was counted."""
        same = np.diag(self._table)
        ours, theirs = self._table.sum(axis=1), self._table.sum(axis=0)
        total = int(self._table.sum())
        dice = {
            organ: float(2 * same[n] / (ours[n] + theirs[n])) if ours[n] + theirs[n] else None
            for n, organ in enumerate(self._organs, start=1)
        }
        return Parity(
            total, total - int(same[0]), total - int(same.sum()), dice, max_logit_difference
        )
