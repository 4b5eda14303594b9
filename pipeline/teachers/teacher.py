"""What a teacher is to the rest of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import log_odds
from pipeline.data.patches import Index3
from pipeline.data.resample import resample
from pipeline.data.volume import Spacing, Volume
from pipeline.errors import PipelineError, TeacherError
from pipeline.teachers.outputs import OutputsOfCase

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.networks.windows import Sink

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image.

    Attributes:
        logits: float32 (C, D, H, W) on a grid of the teacher's choice; voxels outside it count as
            not seen.
        features: tap -> float32 (F, d, h, w), each on its own coarse grid.
    """

    logits: Volume
    features: Mapping[str, Volume] = field(default_factory=dict)


class Teacher(Protocol):
    """A loaded network that owns its preprocessing."""

    @property
    def spacing_mm(self) -> Spacing | None:
        """Spacing (z, y, x) that `predict` wants its image at; None: the image's own grid."""

    def predict(self, image: Volume) -> Prediction:
        """Runs the network on int16 HU (D, H, W) in RAS+."""

    def describe(self) -> Mapping[str, Any]:
        """Everything, as plain JSON values, that changes the numbers `predict` returns, without
        the weights' bytes, which the caller digests."""


@runtime_checkable
class StreamingTeacher(Teacher, Protocol):
    """A teacher that need not hold all its channels of a whole volume at once."""

    @property
    def strides(self) -> Mapping[str, Index3]:
        """Per tap, voxels of the image per feature cell along z, y, x."""

    def stream(self, image: Volume, *, logits: Sink, features: Mapping[str, Sink]) -> None:
        """`predict`, slab by slab: logits on the image's grid, each tap on the grid of its cells.

        Args:
            image: int16 HU (D, H, W) at `spacing_mm`.
            logits: takes slabs (C, n, H, W), D rows in all.
            features: tap -> takes slabs (F, n, h, w).
        """


def organ_log_odds(
    prediction: Prediction, entry: TeacherEntry, *, where: str
) -> Mapping[str, Volume]:
    """The log-odds of each organ that a teacher is expert in, on the prediction's own grid.

    Raises:
        TeacherError: NaN or infinite outputs, outputs that are no logits, or channels that disagree
            with the registry.
    """
    logits = prediction.logits
    for tap, feature in prediction.features.items():
        check_finite(feature.array, f"features of {tap}", where)
    odds = slab_log_odds(logits.array, entry, where=where)
    outputs = OutputsOfCase(entry, where=where)
    outputs.put(logits.array)
    outputs.judge()
    return {organ: Volume(values, logits.grid) for organ, values in odds.items()}


def slab_log_odds(
    logits: FloatArray, entry: TeacherEntry, *, where: str
) -> Mapping[str, FloatArray]:
    """The log-odds of each organ that a teacher is expert in, voxel by voxel.

    Args:
        logits: (C, n, H, W): a slab, or all of a volume.

    Returns:
        Organ -> (n, H, W).

    Raises:
        TeacherError: NaN or infinite outputs, or channels that disagree with the registry.
    """
    num_channels = logits.shape[0]
    if entry.num_channels is not None and num_channels != entry.num_channels:
        raise TeacherError(
            f"the network emits {num_channels} channels, the registry says {entry.num_channels}.",
            where=where,
            fix="Correct `num_channels` and `organs`, or name the right weights.",
        )
    check_finite(logits, "logits", where)
    return {
        organ: log_odds(logits, channels, entry.activation, where=where)
        for organ, channels in entry.organs.items()
    }


def tap_agreement(
    teacher: Teacher,
    image: Volume,
    cached: Mapping[str, Volume],
    patch: Sequence[int],
    *,
    seed: int,
    num_patches: int = 1,
) -> dict[str, float]:
    """How alike a teacher's features of a patch that begins anywhere are to those of the whole
    image there: what a student with the teacher's own weights would score.

    Args:
        cached: tap -> features of the whole image (F, d, h, w), on any grid.
        patch: voxels; less where the image has no more.

    Returns:
        Tap -> median over channels of Pearson's r over cells. Taps of which no channel varies are
        absent, and so are all those of a teacher that cannot be run on a patch.
    """
    rng = np.random.default_rng(seed)
    pairs: dict[str, list[FloatArray]] = {tap: [] for tap in cached}
    for _ in range(num_patches if cached else 0):
        sizes = list(zip(image.grid.shape, patch, strict=True))
        start = [int(rng.integers(max(n - p, min(7, n // 4)) + 1)) for n, p in sizes]
        shape = [min(p, n - a) for (n, p), a in zip(sizes, start, strict=True)]
        z, y, x = (slice(a, a + n) for a, n in zip(start, shape, strict=True))
        part = replace(image, array=image.array[z, y, x].copy(), grid=image.grid.crop(start, shape))
        try:
            said = teacher.predict(part).features
        except TeacherError:  # of the user's own code, which need not take every size
            return {}
        for tap, whole in cached.items():
            there = resample(whole, said[tap].grid, order=1, outside=np.nan).array
            pairs[tap].append(np.stack([said[tap].array, there]).reshape(2, len(there), -1))
    medians = {tap: _median_pearson(np.concatenate(found, axis=2)) for tap, found in pairs.items()}
    return {tap: median for tap, median in medians.items() if median is not None}


def _median_pearson(pairs: FloatArray) -> float | None:
    """Of (2, F, n), where both are finite."""
    both = pairs[:, :, np.isfinite(pairs).all(axis=(0, 1))].astype(np.float64)
    if both.shape[2] == 0:
        return None
    both -= both.mean(axis=2, keepdims=True)
    scale = np.sqrt((both**2).sum(axis=2).prod(axis=0))
    alike = (both[0] * both[1]).sum(axis=1)[scale > 0] / scale[scale > 0]
    return round(float(np.median(alike)), 3) if alike.size else None


def load_weights(
    network: nn.Module, state: Mapping[str, Tensor], named: str, *, where: str
) -> None:
    """Puts weights into a network that learns nothing more; `named` is how the error calls it.

    Raises:
        TeacherError: they do not fit, or are not finite.
    """
    try:
        network.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise TeacherError(
            f"the weights do not fit the network {named} ({first_lines(error)}).",
            where=where,
            fix="The file was changed, or description and weights are of different versions: train "
            "or fetch it again. A network built by code of its own needs kind `factory`.",
        ) from error
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        if not bool(parameter.isfinite().all()):
            raise TeacherError(
                "the weights hold NaN or infinity.", where=where, fix="Train or fetch them again."
            )


def probed_taps(
    network: nn.Module, entry: TeacherEntry, window: Sequence[int], *, where: str
) -> Mapping[str, tuple[int, Index3]]:
    """Runs one window: tap -> number of channels, and voxels per cell along z, y, x.

    Raises:
        TeacherError: the network cannot run it, or has no such taps.
    """
    from pipeline.networks.by_name import tap_shapes

    try:
        return tap_shapes(network, entry.taps, window)
    except (RuntimeError, ValueError, PipelineError) as error:
        raise TeacherError(
            f"the network cannot run windows of {tuple(window)} voxels with taps "
            f"{list(entry.taps)} ({first_lines(error)}).",
            where=where,
            fix="Tap layers that it has. Its strides must divide the window: that of the stage's "
            "settings, or of a bundle the `roi_size` of its inferer.",
        ) from error


def first_lines(error: Exception) -> str:
    """The first three of its lines, as one."""
    return " ".join(" ".join(str(error).strip().split("\n")[:3]).split())[:300]


def check_finite(array: npt.NDArray[Any], what: str, where: str) -> None:
    """Refuses NaN and infinity: to the cache NaN means "not seen", so it must not come from a net.

    Raises:
        TeacherError: with the number of bad values.
    """
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise TeacherError(
            f"{bad} of {array.size} {what} are NaN or infinite.",
            where=where,
            fix="Look at this case's intensities and at the teacher's intensity settings; nothing "
            "was cached for it.",
        )
