"""How large everything is: numbers that all seeds and supervisions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.accuracy.configurations import merged

PIXEL_MM = 1.5  # nominal: the true one is unknown, and differs
SLICES = 1  # that a case has
TAP = "model.1.submodule.0"  # cached of teachers, and compared with the student's: an encoder stage


@dataclass(frozen=True)
class Size:
    """Networks and budgets.

    Attributes:
        name: in records.
        grid_mm: of the student grid and of the teachers, in the plane and between slices.
        patch: pixels a side, of teachers, students and windows.
        channels: of the network's levels, teachers and students alike.
        batch_size: slices of a step, of all trainings.
        lr: of all trainings.
        teacher_steps: of every teacher.
        teacher_augment: preset of every teacher; None: what `train-teachers` does by default.
        student_steps: of every student, at equal steps.
    """

    name: str = "full"
    grid_mm: float = 2 * PIXEL_MM
    patch: int = 96
    channels: tuple[int, ...] = (16, 32, 64, 128)
    batch_size: int = 8
    lr: float = 0.002
    teacher_steps: int = 800
    teacher_augment: str | None = None
    student_steps: int = 1000

    @property
    def window(self) -> list[int]:
        """The patch (D, H, W)."""
        return [SLICES, self.patch, self.patch]

    @property
    def spacing_mm(self) -> list[float]:
        """z, y, x."""
        return [self.grid_mm] * 3

    @property
    def network(self) -> dict[str, Any]:
        """A plain two-dimensional UNet: no kernel reaches into another slice."""
        flat = [1, 3, 3]
        levels = len(self.channels) - 1
        args = {
            "channels": list(self.channels), "strides": [[1, 2, 2]] * levels, "num_res_units": 0,
            "norm": "instance", "kernel_size": flat, "up_kernel_size": flat,
        }  # fmt: skip
        return {"name": "UNet", "args": args}

    def training(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a training, without seed and steps; what differs is laid over them."""
        base = {
            "network": self.network,
            "patch": self.window,
            "batch_size": self.batch_size,
            "intensity": INTENSITY,
            "optimiser": {"lr": self.lr},
        }
        return merged(base, changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        said = asdict(self) | {"pixel_mm": PIXEL_MM, "slices_of_a_case": SLICES}
        if self.teacher_augment is None:  # as in folders that are older than the field
            del said["teacher_augment"]
        return said


GREYS: Sequence[float] = (0.0, 255.0)  # the Hounsfield units that 8 bits were made of
INTENSITY: Mapping[str, Any] = {"kind": "window", "window_hu": list(GREYS)}
SIZES = {
    size.name: size
    for size in (
        Size(),
        Size(name="experts", teacher_steps=2500, teacher_augment="strong", student_steps=2500),
        Size(
            name="tiny",
            patch=16,
            channels=(4, 8, 8),
            batch_size=2,
            teacher_steps=2,
            teacher_augment="strong",
            student_steps=2,
        ),
    )
}
