"""Whether an image can be CT in Hounsfield units, by how often each value occurs, and whether its
header can be trusted.

By definition water is 0 HU and air -1000. Fat lies near -100, other soft tissue at 0 to 100, and
only dense bone, contrast medium and metal above 800. So wherever a body is, values between -200 and
300 are common and values above 850 are rare. The limits below are coarse on purpose: thin patients,
metal, contrast medium, lungs, and crops within one organ or around a bone must pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

OFFSET = 32768  # bin 0 is -32768 HU
Counts = npt.NDArray[np.int64]
Severity = Literal["error", "warning"]

_SLAB_VOXELS = 4_000_000
_SMOOTH_HU = 21
_HEAP = 0.03
_LEAST_SPAN = 20  # noise alone is wider
_TOLERANCE_MM = 0.1
_RESCALE = "Check rescale slope and intercept."


@dataclass(frozen=True)
class Intensities:
    """How an image's values are spread, in HU; where the peak between -300 and 400 lies, None where
    nothing is there; and the median of the eight corners."""

    low: int
    high: int
    soft_tissue: int | None
    corners: int


@dataclass(frozen=True)
class Doubt:
    """Why an image may not be what it is taken for, and what to do; an error is certain."""

    severity: Severity
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} {self.fix}"


def doubts_of(array: npt.NDArray[np.int16]) -> list[Doubt]:
    """`doubts` of an image (D, H, W) in HU; one pass over it."""
    counts = value_counts(array)
    return doubts(counts, intensities(array, counts))


def value_counts(array: npt.NDArray[np.int16] | npt.NDArray[np.uint16]) -> Counts:
    """How often each of the 65536 values of int16 or uint16 occurs, int64; bin 0 is the least."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint16)
    counts = np.zeros(65536, dtype=np.int64)
    # Slab by slab: bincount makes int64 of all that it is given.
    for begin in range(0, flat.size, _SLAB_VOXELS):
        counts += np.bincount(flat[begin : begin + _SLAB_VOXELS], minlength=65536)
    return np.roll(counts, OFFSET) if array.dtype.kind == "i" else counts


def intensities(array: npt.NDArray[np.int16], counts: Counts) -> Intensities:
    """The spread of an image (D, H, W) in HU, by it and its `value_counts`."""
    present = np.flatnonzero(counts)
    low, high = int(present[0]) - OFFSET, int(present[-1]) - OFFSET
    sides = [max(1, n // 20) for n in array.shape]
    ends = [(slice(None, side), slice(-side, None)) for side in sides]
    blocks = [array[z, y, x].ravel() for z in ends[0] for y in ends[1] for x in ends[2]]
    corners = int(np.median(np.concatenate(blocks)))
    return Intensities(low, high, _peak(counts, low, high), corners)


def doubts(counts: Counts, seen: Intensities) -> list[Doubt]:
    """Why an image may be no CT in HU, by its `value_counts` and `intensities`; the first certain
    reason alone, or all improbable ones."""
    certain = _scaled(counts, seen) or _shifted(counts, seen)
    if certain is not None:
        return [certain]
    found = []
    if seen.low >= 0:
        what = f"no value is below 0 ({seen.low} to {seen.high}): neither fat nor air."
        fix = "Right for a crop within an organ or a bone; else check rescale slope and intercept."
        found.append(Doubt("warning", what, fix))
    if (clipped := _clipped(counts, seen)) is not None:
        found.append(clipped)
    if seen.soft_tissue is not None and not -150 <= seen.soft_tissue <= 150:
        what = f"the peak of soft tissue lies at {seen.soft_tissue} HU; 0 to 100 is usual, and "
        found.append(Doubt("warning", f"{what}-100 for fat.", _RESCALE))
    if -850 < seen.corners < -300:
        what = f"the corners of the image are at {seen.corners} HU: air would be near -1000."
        found.append(Doubt("warning", what, _RESCALE))
    return found


def _scaled(counts: Counts, seen: Intensities) -> Doubt | None:
    span = f"values run from {seen.low} to {seen.high}"
    again = "Export the CT itself again, in HU."
    if seen.low == seen.high:
        return Doubt("error", f"every voxel is {seen.low}.", again)
    if seen.high - seen.low <= _LEAST_SPAN:
        what = f"{span}: an image that was normalised, or a mask."
        return Doubt("error", what, again)
    if seen.low >= 0 and seen.high <= 255 and _has_background(counts):
        what = f"{span}: a picture in grey levels, or a label map, not HU."
        return Doubt("error", what, again)
    return None


def _shifted(counts: Counts, seen: Intensities) -> Doubt | None:
    tissue, above = _share(counts, -200, 300), _share(counts, 850, 1200)
    air, fat, lung = (_share(counts, *ends) for ends in ((-1150, -850), (-200, -60), (-850, -400)))
    # Around a bone fat is left where it belongs; shifted up, next to nothing lies there.
    # Corners up there beside a lot of tissue are no air that was shifted: magnitudes, or MR.
    inverted = seen.corners > 850 and tissue > 0.05
    if above > 0.1 and air < 0.005 and fat < above / 5 and not inverted:
        return Doubt(
            "error",
            f"values lie about 1000 too high: {above:.0%} of the voxels are between 850 and 1200, "
            "where only dense bone is, and next to none is air (-1000).",
            "It was stored with an offset: subtract 1024 (or set the rescale intercept) and save "
            "again.",
        )
    # What lies at -850 to -400 is lung, or bone and contrast medium shifted down, which are rare.
    if tissue < 0.02 and air > 0.1 and seen.low < -1700 and lung < air / 5:
        return Doubt(
            "error",
            f"values lie about 1000 too low: {air:.0%} of the voxels are near -1000, only "
            f"{tissue:.1%} between -200 and 300.",
            "The rescale intercept was applied twice: add 1024 and save again.",
        )
    if seen.low >= 0 and (_has_background(counts) or seen.corners > 850):
        return Doubt(
            "error",
            f"no value is below 0 ({seen.low} to {seen.high}): fat (-100) and air (-1000) are "
            "missing.",
            "Unsigned storage without the rescale intercept, a window, or no CT at all: export "
            "the CT again, in HU.",
        )
    if tissue < 0.01 and lung < 0.1:
        return Doubt(
            "error",
            f"only {tissue:.1%} of the voxels lie between -200 and 300 HU, where soft tissue is "
            f"(values run from {seen.low} to {seen.high}).",
            "Is it a CT, and were rescale slope and intercept applied? Export it again.",
        )
    return None


def _has_background(counts: Counts) -> bool:
    """Whether many values are 0 or next to it, as in pictures, label maps and MR; a crop within an
    organ or a bone has few there."""
    return _share(counts, 0, 20) > 0.1


def _clipped(counts: Counts, seen: Intensities) -> Doubt | None:
    total = int(counts.sum())
    bottom = int(counts[seen.low + OFFSET]) / total
    if seen.low <= -900 or bottom < _HEAP:
        return None
    top = int(counts[seen.high + OFFSET]) / total
    upper = f" and {top:.1%} exactly {seen.high}" if top > 0.001 else ""
    return Doubt(
        "warning",
        f"the image was windowed: {bottom:.0%} of the voxels are exactly {seen.low}{upper}.",
        "Teachers that were trained on whole HU see another air; use the CT before windowing, "
        "unless all teachers clip to a narrower window.",
    )


def _peak(counts: Counts, low: int, high: int) -> int | None:
    """The most frequent value between -300 and 400 HU, smoothed; heaps at both ends left out."""
    inner = counts.astype(np.float64)
    inner[[low + OFFSET, high + OFFSET]] = 0
    smooth = np.convolve(inner[OFFSET - 400 : OFFSET + 500], np.ones(_SMOOTH_HU), mode="same")
    smooth = smooth[100:801]
    return int(np.argmax(smooth)) - 300 if smooth.any() else None


def _share(counts: Counts, low: int, high: int) -> float:
    """Of the voxels from `low` to `high` HU, both included."""
    return float(counts[low + OFFSET : high + OFFSET + 1].sum() / counts.sum())


# What a NIfTI header says that makes its geometry doubtful although it can be read.


def header_doubts(image: Any) -> tuple[Doubt, ...]:
    """Doubts about units, about a place that nobody recorded, and about two that contradict, of an
    image as nibabel loads it; its voxels are not read."""
    return tuple(_units(image.header) + _forms(image.header, image.shape))


def _units(header: Any) -> list[Doubt]:
    try:
        unit = str(header.get_xyzt_units()[0])
    except KeyError:  # a code that NIfTI does not define
        return []
    if unit not in ("meter", "micron"):
        return []
    what = f"the header gives lengths in {unit}s; they are read as mm."
    return [Doubt("error", what, "Write the file again in mm.")]


def _forms(header: Any, shape: tuple[int, ...]) -> list[Doubt]:
    fix = "Export it again from its source, and look at it in a viewer that shows left and right."
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        what = (
            "the header records no orientation (sform and qform codes are 0): which side is left "
            "is a guess."
        )
        return [Doubt("warning", what, fix)]
    if not sform or not qform:
        return []
    try:
        apart = header.get_sform() - header.get_qform()
    except Exception as error:  # nibabel raises what it likes for a damaged quaternion
        return [Doubt("warning", f"its qform cannot be read ({error}).", fix)]
    corners = np.array([[*c, 1] for c in product(*((0, n - 1) for n in (*shape, 1, 1, 1)[:3]))]).T
    most = float(np.linalg.norm((apart @ corners)[:3], axis=0).max())
    if not most > _TOLERANCE_MM:
        return []
    what = (
        f"sform and qform place its voxels up to {most:.1f} mm apart; the sform is used here, "
        "other tools may use the qform."
    )
    fix = "Find out which is right and save the file with that one alone."
    return [Doubt("warning", what, fix)]
