"""Every teacher on one small crop, to see what is wrong before stage one does."""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.consensus.cohort import doubtful_tap
from pipeline.data.nifti import read_image
from pipeline.data.registry import Registry
from pipeline.data.resample import resample
from pipeline.data.volume import Volume
from pipeline.engine.processes import memory_bytes
from pipeline.errors import PipelineError, RegistryError, TeacherWarning
from pipeline.log import Log, print_table
from pipeline.networks.by_name import pick_device
from pipeline.teachers.load import Teachers
from pipeline.teachers.teacher import organ_log_odds, tap_agreement

_PATCHES = 12  # that a tap's agreement with itself is measured on


@dataclass(frozen=True)
class TeacherCheck:
    """What one teacher did with the crop; all but the first three are empty if it failed.

    Attributes:
        organs: organ -> the output channels that mean it, from the registry.
        spacing_mm: z, y, x of the grid that its logits are on.
        orientation: of an nnU-Net, the order of axes that it is given: letters, or `stored`.
        organ_ml: organ -> millilitres of the crop where its log-odds are above 0.
        taps: tap -> (F, d, h, w) of its features.
        agreement: tap -> see `tap_agreement`.
        memory_bytes: growth of peak memory while it was loaded and run; None if not known.
    """

    teacher: str
    kind: str
    organs: Mapping[str, Sequence[int]]
    problem: str | None = None
    fix: str = ""
    warnings: Sequence[str] = ()
    num_channels: int | None = None
    spacing_mm: Sequence[float] = ()
    orientation: str = ""
    shape: Sequence[int] = ()
    organ_ml: Mapping[str, float] = field(default_factory=dict)
    taps: Mapping[str, Sequence[int]] = field(default_factory=dict)
    agreement: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int | None = None
    load_seconds: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class CheckReport:
    """One row per teacher of the registry, and what they were shown."""

    case: str
    crop_shape: Sequence[int]
    crop_spacing_mm: Sequence[float]
    device: str
    teachers: Sequence[TeacherCheck]

    @property
    def num_failed(self) -> int:
        """How many teachers cannot be used."""
        return sum(row.problem is not None for row in self.teachers)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "num_failed": self.num_failed}


def check_teachers(
    teachers: Teachers,
    log: Log,
    *,
    case: str | None = None,
    dataset: str | None = None,
    side_mm: float = 120.0,
) -> CheckReport:
    """Loads and runs every teacher as stage one does, on the middle of one case.

    A teacher that fails is reported in its row, and the others are tried all the same.

    Args:
        case: `dataset/case`; None takes the first that can be read.
        side_mm: of the crop, a cube where the image is that large.

    Raises:
        PipelineError: no teacher, no such case, or no case that can be read.
    """
    registry = teachers.registry
    if not registry.teachers:
        raise RegistryError("it has no teachers to check.", where=registry.path, fix="Add some.")
    of_case, native = _one_case(registry, case, dataset)
    crop = middle(native, side_mm)
    rows = []
    with log.progress("teachers", len(registry.teachers)) as advance:
        for name in registry.teachers:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("ignore")  # of libraries: nothing a user could act on
                warnings.simplefilter("always", TeacherWarning)
                row = _check_one(teachers, name, crop, f"{name} x {of_case}")
            rows.append(replace(row, warnings=[str(one.message) for one in heard]))
            advance(name)
    used = str(pick_device(teachers.device))
    return CheckReport(of_case, crop.grid.shape, crop.spacing_mm, used, rows)


def middle(image: Volume, side_mm: float) -> Volume:
    """The box about the middle of an image whose sides are `side_mm`, or the image's if shorter; of
    a volume never one slice."""
    spacing = np.array(image.spacing_mm)
    shape = np.minimum(image.grid.shape, np.maximum(2, np.rint(side_mm / spacing))).astype(int)
    start = (np.array(image.grid.shape) - shape) // 2
    z, y, x = (slice(a, a + n) for a, n in zip(start.tolist(), shape.tolist(), strict=True))
    grid = image.grid.crop(start.tolist(), shape.tolist())
    return replace(image, array=np.ascontiguousarray(image.array[z, y, x]), grid=grid)


def print_check(report: CheckReport) -> None:
    """A table for people; what is wrong is told with the other findings."""
    size = " x ".join(str(n) for n in report.crop_shape)
    spacing = " x ".join(f"{mm:g}" for mm in np.round(report.crop_spacing_mm, 2))
    title = f"Teachers on the middle of {report.case} ({size} voxels of {spacing} mm)"
    columns = [
        "teacher", "kind", "channels", "organ: its channels", "ml found", "spacing, mm",
        "tap: channels, cells", "agrees with itself", "memory", "seconds", "result",
    ]  # fmt: skip
    print_table(title, columns, [_cells(row) for row in report.teachers])


def _cells(row: TeacherCheck) -> list[str]:
    organs = [f"{organ}: {', '.join(map(str, channels))}" for organ, channels in row.organs.items()]
    taps = [f"{tap}: {f}, {d} x {h} x {w}" for tap, (f, d, h, w) in row.taps.items()]
    agreement = [f"{row.agreement[tap]:.2f}" if tap in row.agreement else "–" for tap in row.taps]
    return [
        row.teacher,
        row.kind,
        "" if row.num_channels is None else str(row.num_channels),
        "\n".join(organs),
        "\n".join(f"{row.organ_ml[organ]:.0f}" for organ in row.organs if row.organ_ml),
        " x ".join(f"{mm:.4g}" for mm in row.spacing_mm),
        "\n".join(taps),
        "\n".join(agreement),
        "" if row.memory_bytes is None else f"{row.memory_bytes / 2**20:.0f} MiB",
        "" if row.seconds is None else f"{row.seconds:.2f}",
        "ok" if row.problem is None else "fails",
    ]


def _one_case(registry: Registry, case: str | None, dataset: str | None) -> tuple[str, Volume]:
    datasets = [name for name in registry.datasets if dataset in (None, name)]
    sources = [source for name in datasets for source in registry.cases(name)]
    if case is not None:
        sources = [source for source in sources if source.name == case]
    unread: list[str] = []
    for source in sources:
        try:
            return source.name, read_image(source.image).volume
        except PipelineError as error:
            unread.append(str(error))
    what = f"no case {case!r}" if case and not sources else "no case that can be read"
    raise RegistryError(
        f"there is {what}{': ' + unread[0] if unread else '.'}",
        where=registry.path,
        fix="For a phantom run `pipeline phantom`; a case is named dataset/case.",
    )


def _check_one(teachers: Teachers, name: str, crop: Volume, where: str) -> TeacherCheck:
    entry = teachers.registry.teachers[name]
    row = TeacherCheck(name, entry.kind, entry.organs)
    memory = _Memory(teachers.device)
    began = time.monotonic()
    try:
        teacher = teachers.open(name).teacher
        loaded = time.monotonic()
        image = crop
        if teacher.spacing_mm is not None:
            image = resample(crop, crop.grid.with_spacing(teacher.spacing_mm), order=1)
        prediction = teacher.predict(image)
        odds = organ_log_odds(prediction, entry, where=where)
        ran = time.monotonic()
        agreement = tap_agreement(
            teacher, image, prediction.features, teachers.window.shape, seed=0, num_patches=_PATCHES
        )
    except PipelineError as error:
        what = error.what if error.where is None else f"{error.where}: {error.what}"
        return replace(row, problem=what, fix=error.fix)
    except Exception as error:  # nobody foresaw it: the other teachers are checked all the same
        what = "".join(traceback.format_exception(error)).rstrip()
        return replace(row, problem=what, fix="Its code or its registry entry must be mended.")
    for tap, agrees in agreement.items():
        if (doubt := doubtful_tap(tap, agrees)) is not None:
            warnings.warn(doubt, TeacherWarning, stacklevel=2)
    logits = prediction.logits
    return replace(
        row,
        num_channels=int(logits.array.shape[0]),
        spacing_mm=logits.spacing_mm,
        orientation=getattr(teacher, "orientation", ""),
        shape=logits.grid.shape,
        organ_ml={
            organ: round(np.count_nonzero(volume.array > 0) * logits.grid.voxel_ml, 3)
            for organ, volume in odds.items()
        },
        taps={tap: volume.array.shape for tap, volume in prediction.features.items()},
        agreement=agreement,
        memory_bytes=memory.grown(),
        load_seconds=round(loaded - began, 3),
        seconds=round(ran - loaded, 3),
    )


class _Memory:
    """How far peak memory rises above what is in use now: of the GPU if that is where the teacher
    runs, else of this process."""

    def __init__(self, device: str) -> None:
        gc.collect()
        self._cuda = pick_device(device) if pick_device(device).type == "cuda" else None
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
            return
        with suppress(OSError):  # Linux forgets its earlier peak when told so
            Path("/proc/self/clear_refs").write_text("5")
        self._before = memory_bytes("VmHWM")

    def grown(self) -> int | None:
        """Bytes; None where an earlier peak hides it."""
        if self._cuda is not None:
            import torch

            return int(torch.cuda.max_memory_allocated(self._cuda)) - self._before
        return max(0, memory_bytes("VmHWM") - self._before) or None
