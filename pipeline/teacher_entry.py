"""What a registry says about one teacher. Data only: nothing here loads a network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config import Config
from pipeline.intensity import Intensity


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


OneOrMore = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple), Field(min_length=1)
]


class AdmissionEntry(Config):
    """What is asked of every teacher before the bulk of stage one is spent on it.

    It decides what is done, never how: no value here is in a digest or in a registry key.
    """

    dice: float = Field(
        default=0.5, ge=0, le=1,
        description="mean Dice on labelled cases, per organ and dataset, below which "
        "cache-teachers stops",
    )  # fmt: skip
    cases: int = Field(
        default=3, ge=1,
        description="cases looked at of each dataset without a label of the organ, and training "
        "cases scored where an organ has no validation case",
    )  # fmt: skip


class TeacherAdmission(Config):
    """What is asked of one teacher instead."""

    dice: float | None = Field(default=None, ge=0, le=1, description="instead of `admission.dice`")


class TeacherEntry(Config):
    """One pre-trained network and the organs that it is expert in."""

    kind: Literal["checkpoint", "factory"] = Field(
        description="`checkpoint`: made by `pipeline train-teachers`; `factory`: your own code"
    )
    weights: str = Field(min_length=1, description="path, relative to the registry's folder")
    organs: dict[str, OneOrMore] = Field(
        min_length=1, description="organ -> output channel, or list of channels, that mean it"
    )
    num_channels: int | None = Field(
        default=None, ge=1, description="output channels; checked here and against the network"
    )
    activation: Literal["softmax", "sigmoid"] = "softmax"
    spacing_mm: tuple[float, float, float] | None = Field(
        default=None,
        description="z, y, x; what the network was trained at. Left out: the student grid for a "
        "checkpoint, the image's own grid for a factory",
    )
    intensity: Intensity = Field(default_factory=Intensity)
    taps: tuple[str, ...] = Field(default=(), description="layers whose features are cached")
    factory: str | None = Field(
        default=None, pattern=r"^[\w.]+:\w+$", description="`module:function`, for kind factory"
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the factory"
    )
    trained_on: str | None = Field(
        default=None, description="dataset that `pipeline train-teachers` trains it on"
    )
    admission: TeacherAdmission = Field(default_factory=TeacherAdmission)
    licence: str = ""
    source: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> TeacherEntry:
        if (self.kind == "factory") != (self.factory is not None):
            raise ValueError("`factory: module:function` belongs to kind `factory`, and only there")
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm {self.spacing_mm} must be positive")
        return self
