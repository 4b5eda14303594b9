"""How large everything is: the numbers that all regimes share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Size:
    """Sizes of volumes, networks, budgets and sets of cases.

    Attributes:
        name: in requests and records.
        shape: nominal voxels (D, H, W) of a phantom.
        spacing_mm: of the student grid and of the teachers, along each axis.
        patch: voxels (D, H, W), of teachers, students and windows.
        channels: of the network's levels, teachers and students alike.
        tap: the layer whose features are cached, and the student's layer that is compared with it.
        batch_size: of all trainings.
        lr: of all trainings.
        teacher_steps: of every teacher.
        short_steps: of a student, the smaller budget.
        long_steps: the larger one.
        validation_cases: of each single-organ dataset.
        test_cases: of each single-organ dataset's own distribution, fully labelled.
        multi_validation_cases: of the fully labelled set.
        multi_test_cases: of the fully labelled set.
        most_cases: caps the training cases of any dataset; for tests.
        draws: of the bootstrap.
    """

    name: str = "full"
    shape: Triple = (36, 42, 48)
    spacing_mm: float = 8.0
    patch: Triple = (24, 32, 32)
    channels: tuple[int, ...] = (16, 32, 64, 96)
    tap: str = "model.1.submodule.0"
    batch_size: int = 2
    lr: float = 0.003
    teacher_steps: int = 300
    short_steps: int = 150
    long_steps: int = 450
    validation_cases: int = 2
    test_cases: int = 3
    multi_validation_cases: int = 3
    multi_test_cases: int = 4
    most_cases: int = 1000
    draws: int = 10_000

    def steps(self, budget: str) -> int:
        """Of a student in a budget, `short` or `long`."""
        return {"short": self.short_steps, "long": self.long_steps}[budget]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


FULL = Size()
TINY = Size(
    name="tiny",
    shape=(24, 28, 32),
    spacing_mm=12.0,
    patch=(16, 16, 16),
    channels=(4, 8, 8, 8),
    teacher_steps=2,
    short_steps=2,
    long_steps=3,
    validation_cases=1,
    test_cases=1,
    multi_validation_cases=1,
    multi_test_cases=1,
    most_cases=2,
    draws=200,
)
SIZES = {size.name: size for size in (FULL, TINY)}
BUDGETS = ("short", "long")
