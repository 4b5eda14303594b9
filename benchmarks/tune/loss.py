"""What is lost between an array and what is read back of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import dask.array as da
import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit

from pipeline.consensus.cohort import compute
from pipeline.consensus.regions import average_experts, consensus

TEMPERATURES = (1, 2, 4)
_PIECE = 1 << 20
FloatArray = npt.NDArray[np.float32]
# organ -> its arrays, one per teacher that is expert in it
ByOrgan = Mapping[str, Sequence[FloatArray]]


@dataclass
class KL:
    """Kullback-Leibler divergence, in nats per voxel, summed over what was added.

    Attributes:
        total: temperature -> sum over seen voxels.
        largest: of any voxel at any temperature.
        num_voxels: seen voxels.
    """

    total: dict[int, float] = field(default_factory=lambda: dict.fromkeys(TEMPERATURES, 0.0))
    largest: float = 0.0
    num_voxels: int = 0

    def add(self, exact: FloatArray, stored: FloatArray) -> None:
        """Adds the voxels of one array; NaN, not seen, does not count."""
        seen = ~np.isnan(exact)
        a, b = exact[seen].astype(np.float64), stored[seen].astype(np.float64)
        self.num_voxels += a.size
        for begin in range(0, a.size, _PIECE):
            piece = slice(begin, begin + _PIECE)
            for temperature in TEMPERATURES:
                values = binary_kl(a[piece] / temperature, b[piece] / temperature)
                self.total[temperature] += float(values.sum())
                self.largest = max(self.largest, float(values.max()))

    def mean(self, temperature: int) -> float:
        """Per seen voxel."""
        return self.total[temperature] / max(1, self.num_voxels)


def binary_kl(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """KL(sigmoid(a) || sigmoid(b)) per element, in nats:
    p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q)), with log(1 - p) = log p - a."""
    log_p, log_q = log_expit(a), log_expit(b)
    difference = log_p - log_q
    divergence = difference - expit(-a) * (a - b)
    return np.asarray(np.maximum(divergence, 0.0))


def flips(exact: ByOrgan, stored: ByOrgan) -> tuple[int, int]:
    """Voxels of a case whose class, and whose regions, are others than before.

    The class is the argmax over the organs' log-odds and 0 for background; the regions are the
    organ regions, the agreed background and the conflicts of `pipeline.consensus.regions`, margin
    0.

    Returns:
        Argmax flips, region flips.
    """
    before, after = (_decide(by_organ) for by_organ in (exact, stored))
    argmax = int(np.count_nonzero(before[0] != after[0]))
    changed = np.any(before[1] != after[1], axis=0) | (before[2] != after[2])
    return argmax, int(np.count_nonzero(changed))


def _decide(by_organ: ByOrgan) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_], FloatArray]:
    lazy = [average_experts([da.from_array(a) for a in arrays]) for arrays in by_organ.values()]
    regions = consensus(da.stack(lazy))
    odds, organ, background = compute(regions.log_odds, regions.organ, regions.background)
    candidates = np.concatenate([np.zeros_like(odds[:1]), np.nan_to_num(odds, nan=-np.inf)])
    return np.argmax(candidates, axis=0), organ, background


@dataclass
class FeatureError:
    """Error of features, summed over what was added.

    Attributes:
        squared: per channel the mean squared difference over the mean square, summed.
        num_channels: channels added.
        largest: largest difference over its channel's root mean square.
        cosine: 1 - cos between exact and stored, the distance that the student's feature term
            measures, summed over cells.
        num_cells: cells added.
    """

    squared: float = 0.0
    num_channels: int = 0
    largest: float = 0.0
    cosine: float = 0.0
    num_cells: int = 0

    def add(self, exact: FloatArray, stored: FloatArray) -> None:
        """Adds one (F, d, h, w) array; cells not seen, and channels of zeros, do not count."""
        seen = ~np.isnan(exact).any(axis=0)
        a, b = exact[:, seen].astype(np.float64), stored[:, seen].astype(np.float64)
        if a.size == 0:
            return
        power, apart = np.mean(a**2, axis=1), np.abs(a - b)
        counts = power > 0
        self.squared += float(np.sum(np.mean(apart**2, axis=1)[counts] / power[counts]))
        self.num_channels += int(np.count_nonzero(counts))
        relative = apart.max(axis=1)[counts] / np.sqrt(power[counts])
        self.largest = max(self.largest, float(relative.max(initial=0.0)))
        lengths = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
        some = lengths > 0
        self.cosine += float(np.sum(1 - np.sum(a * b, axis=0)[some] / lengths[some]))
        self.num_cells += int(np.count_nonzero(some))

    @property
    def rms(self) -> float:
        """Root mean square error over root mean square, channels alike."""
        return float((self.squared / max(1, self.num_channels)) ** 0.5)

    @property
    def mean_cosine(self) -> float:
        """Mean of 1 - cos per cell."""
        return self.cosine / max(1, self.num_cells)
