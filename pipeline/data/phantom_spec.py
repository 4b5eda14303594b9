"""What determines a dataset of made-up cases. Data only: a registry is read without what draws."""

from __future__ import annotations

from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

ORGANS: Final = ("liver", "spleen", "kidneys", "pancreas")


class PhantomSpec(BaseModel):
    """All that determines a dataset of made-up cases."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_cases: int = Field(ge=1, le=100_000, description="How many cases the dataset has.")
    seed: int = Field(ge=0, description="Source of everything drawn; another seed, other cases.")
    annotated: tuple[str, ...] = Field(
        min_length=1,
        description="Organs that the label files hold, of liver, spleen, kidneys, pancreas. One "
        "organ is written as 1; several are written with the values 1 to 4 of that order.",
    )
    shift: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="How far this dataset lies from the common distribution: noise, contrast "
        "phases, Hounsfield offset, sharpness, field of view, body habitus, slice spacing.",
    )
    shape: tuple[int, int, int] = Field(
        default=(48, 56, 64),
        description="Nominal size (D, H, W) of a case in voxels, over about 288 x 336 x 384 mm; "
        "each case's own size lies around it.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        unknown = sorted(set(self.annotated) - set(ORGANS))
        if unknown or len(set(self.annotated)) != len(self.annotated):
            raise ValueError(f"annotated must be distinct organs of {ORGANS}, not {self.annotated}")
        if min(self.shape) < 16:
            raise ValueError(f"shape must be at least 16 voxels a side, not {self.shape}")
        return self


def case_names(spec: PhantomSpec) -> tuple[str, ...]:
    """The names of a dataset's cases, in order of their index: `case_000`, `case_001`, ..."""
    return tuple(f"case_{i:03d}" for i in range(spec.num_cases))
