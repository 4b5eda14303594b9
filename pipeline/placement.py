"""What a teacher says, slab by slab on its own grid -> the same on the student grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.data.resample import SlabResampler
from pipeline.patches import Index3
from pipeline.teacher_entry import TeacherEntry
from pipeline.teachers.outputs import OutputsOfCase
from pipeline.teachers.teacher import Sink, check_finite, slab_log_odds
from pipeline.volume import Grid

FloatArray = npt.NDArray[np.float32]
_VALUES_AT_ONCE = 4_000_000


class Placement:
    """Takes the logits and features of one case and resamples them, once, as they arrive.

    Of the teacher's channels and of its grid no more than a slab is held: log-odds are formed slab
    by slab and only their rows on the student grid are kept. Voxels outside the teacher's grid are
    NaN.

    Args:
        grid: the student grid of the case.
        entry: which channels mean which organ.
        logits: grid that the logits arrive on.
        features: tap -> grid that its cells arrive on.
        where: teacher and case, named in errors.
    """

    def __init__(
        self,
        grid: Grid,
        entry: TeacherEntry,
        logits: Grid,
        features: Mapping[str, Grid],
        *,
        where: str,
    ) -> None:
        self._entry, self._where = entry, where
        self._outputs = OutputsOfCase(entry, where=where)
        self._odds = {organ: SlabResampler(logits, grid, outside=np.nan) for organ in entry.organs}
        self.strides: Mapping[str, Index3] = {
            tap: feature_stride(cells.spacing_mm, grid.spacing_mm)
            for tap, cells in features.items()
        }
        self._features = {
            tap: SlabResampler(cells, grid.coarsen(self.strides[tap]), outside=np.nan)
            for tap, cells in features.items()
        }

    def put_logits(self, slab: FloatArray) -> None:
        """The next rows, (C, n, H, W).

        Raises:
            TeacherError: NaN or infinite outputs, or channels that disagree with the registry.
        """
        # A few rows at a time: logsumexp takes several times the memory of its input.
        rows = max(1, _VALUES_AT_ONCE // (slab.shape[0] * slab.shape[2] * slab.shape[3]))
        for begin in range(0, slab.shape[1], rows):
            part = slab[:, begin : begin + rows]
            for organ, odds in slab_log_odds(part, self._entry, where=self._where).items():
                self._odds[organ].put(odds)
            self._outputs.put(part)

    @property
    def feature_sinks(self) -> Mapping[str, Sink]:
        """Per tap, what takes the next rows (F, n, h, w); raises as `put_logits` does."""
        return {tap: partial(self._put_feature, tap) for tap in self._features}

    def _put_feature(self, tap: str, slab: FloatArray) -> None:
        check_finite(slab, f"features of {tap}", self._where)
        self._features[tap].put(slab)

    @property
    def log_odds(self) -> Mapping[str, FloatArray]:
        """Organ -> (D, H, W) on the student grid, when all has arrived.

        Raises:
            TeacherError: what has arrived are no logits.
        """
        self._outputs.judge()
        return {organ: slabs.finish().array for organ, slabs in self._odds.items()}

    @property
    def features(self) -> Mapping[str, FloatArray]:
        """Tap -> (F, d, h, w) on the student grid's cells, when all has arrived."""
        return {tap: slabs.finish().array for tap, slabs in self._features.items()}


def feature_stride(cell_mm: Sequence[float], spacing_mm: Sequence[float]) -> Index3:
    """Student-grid voxels per cell: the power of two nearest to the feature's own cell size, so
    that patches of usual sizes lie on whole cells."""
    ratio = np.array(cell_mm) / np.array(spacing_mm)
    z, y, x = (int(2 ** max(0, round(float(np.log2(r))))) for r in ratio)
    return z, y, x
