"""What a registry says about one teacher. Data only: nothing here loads a network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator

from pipeline.config import Config
from pipeline.intensity import Intensity
from pipeline.volume import Orientation


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


_Number = Annotated[int, Field(ge=0)]
OneOrMore = Annotated[
    tuple[_Number, ...],
    BeforeValidator(_as_tuple, json_schema_input_type=_Number | tuple[_Number, ...]),
    Field(min_length=1),
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


# Left out of keys where absent, so that a new kind leaves the keys of older entries alone.
_OPTIONS_OF_KINDS = ("nnunet", "orientation")
_NNUNET_OWNS = ("spacing_mm", "intensity", "args")

Fold = Literal["all"] | Annotated[int, Field(ge=0)]


def _is_orientation(value: str) -> str:
    if value != "stored":
        Orientation.from_code(value)
    return value


def _is_direction(value: str) -> str:
    Orientation.from_code(value)
    return value


class NnunetOptions(Config):
    """How a trained nnU-Net model folder is used; all of it changes numbers."""

    folds: tuple[Fold, ...] | None = Field(
        default=None, min_length=1, description="averaged; left out: all that have the checkpoint"
    )
    checkpoint: str = Field(
        default="checkpoint_final.pth", pattern=r"^[\w.-]+\.pth$", description="in each `fold_X`"
    )
    mirroring: bool = Field(default=True, description="as the trainer allows, as nnU-Net does")
    tile_step: float = Field(default=0.5, gt=0, le=1, description="step between windows")
    orientation: Annotated[str, AfterValidator(_is_orientation)] | None = Field(
        default=None,
        description="`stored`: axes as in each file; or letters such as LPS; left out: what the "
        "model's own image reader does",
    )


class TeacherEntry(Config):
    """One pre-trained network and the organs that it is expert in."""

    kind: Literal["checkpoint", "exported", "monai-bundle", "nnunet", "factory"] = Field(
        description="`checkpoint`: made by `pipeline train-teachers`; `exported`: a TorchScript or "
        "torch.export file; `monai-bundle`: a bundle's folder; `nnunet`: a trained nnU-Net v2 "
        "model folder; `factory`: your own code"
    )
    weights: str = Field(min_length=1, description="path, relative to the registry's folder")
    organs: dict[str, OneOrMore] = Field(
        min_length=1, description="organ -> output channel, or list of channels, that mean it"
    )
    num_channels: int | None = Field(
        default=None, ge=1, description="output channels; checked here and against the network"
    )
    activation: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="what the network was trained with"
    )
    outputs: Literal["logits", "probabilities"] = Field(
        default="logits",
        description="what the network's forward gives; probabilities, of a network that ends in "
        "its activation, are turned into logits window by window",
        # Out of keys and digests: units of before this field stay.
        exclude_if=lambda value: value == "logits",
    )
    spacing_mm: tuple[float, float, float] | None = Field(
        default=None,
        description="z, y, x; what the network was trained at. Left out: the student grid for a "
        "checkpoint, the image's own grid for a factory",
    )
    orientation: Annotated[str, AfterValidator(_is_direction)] | None = Field(
        default=None,
        description="where the axes of the array that the network sees point to, first axis first, "
        "as MONAI's `axcodes`; for kind exported",
    )
    intensity: Intensity = Field(default_factory=Intensity)
    taps: tuple[str, ...] = Field(default=(), description="layers whose features are cached")
    factory: str | None = Field(
        default=None, pattern=r"^[\w.]+:\w+$", description="`module:function`, for kind factory"
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the factory"
    )
    nnunet: NnunetOptions | None = Field(
        default=None, description="for kind nnunet; left out: as nnU-Net itself does by default"
    )
    trained_on: str | None = Field(
        default=None, description="dataset that `pipeline train-teachers` trains it on"
    )
    admission: TeacherAdmission = Field(default_factory=TeacherAdmission)
    licence: str = Field(default="", description="for people; never part of a digest")
    source: str = Field(default="", description="for people; never part of a digest")
    _trusted: bool = PrivateAttr(default=False)

    @property
    def trusted(self) -> bool:
        """Whether the user said that this teacher may run code of its own. No file can say so."""
        return self._trusted

    def trusting(self) -> TeacherEntry:
        """The same entry, trusted."""
        entry = self.model_copy()
        entry._trusted = True
        return entry

    @model_validator(mode="after")
    def _consistent(self) -> TeacherEntry:
        if (self.kind == "factory") != (self.factory is not None):
            raise ValueError("`factory: module:function` belongs to kind `factory`, and only there")
        if self.kind == "nnunet":
            owned = [name for name in _NNUNET_OWNS if name in self.model_fields_set]
            if owned:
                raise ValueError(
                    f"{', '.join(owned)}: not for kind `nnunet`, whose plans.json says how images "
                    "are prepared"
                )
            if self.outputs != "logits":
                raise ValueError("outputs: kind `nnunet` gives logits: leave it out")
            if self.taps:
                raise ValueError(
                    "taps: kind `nnunet` has none, because nnU-Net's windows do not begin at "
                    "multiples of a layer's stride; use a teacher of another kind for features"
                )
        elif self.nnunet is not None:
            raise ValueError("`nnunet` belongs to kind `nnunet`, and only there")
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm {self.spacing_mm} must be positive")
        match self.kind:
            case "exported":
                self._states_all_of_its_preprocessing()
            case "monai-bundle":
                self._leaves_preprocessing_to_the_bundle()
            case _ if self.orientation is not None:
                raise ValueError(f"`orientation` is not for kind `{self.kind}`")
        return self

    def key(self) -> dict[str, Any]:
        """What of this entry can change numbers beside the bytes of its weights, as plain JSON
        values."""
        absent = {name for name in _OPTIONS_OF_KINDS if getattr(self, name) is None}
        other = {"admission", "licence", "source", "weights"}
        return self.model_dump(mode="json", exclude=other | absent)

    def _states_all_of_its_preprocessing(self) -> None:
        wanted = ("spacing_mm", "orientation", "intensity")
        missing = [name for name in wanted if name not in self.model_fields_set]
        if missing or self.spacing_mm is None or self.orientation is None:
            raise ValueError(
                f"an exported file does not say what its network wants to see: give {missing}"
            )
        if self.taps:
            raise ValueError(
                "an exported file has no layers to tap: its modules were compiled away. Leave out "
                "`taps`, or use kind `monai-bundle` or `factory`"
            )

    def _leaves_preprocessing_to_the_bundle(self) -> None:
        given = [name for name in ("spacing_mm", "intensity") if name in self.model_fields_set]
        if given:
            raise ValueError(f"the bundle's own preprocessing sees to that: leave out {given}")
