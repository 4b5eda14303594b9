"""Everything about a training that changes its numbers, and its digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from pipeline.config import Config, digest
from pipeline.intensity import Intensity
from pipeline.network import NetworkConfig
from pipeline.student.augment import FEATURES_STAY, AugmentConfig
from pipeline.student.optimiser import OptimiserConfig
from pipeline.student.sampling import SamplingConfig
from pipeline.student.supervision import SupervisionConfig


class TrainingConfig(Config):
    """Everything about a training that changes its numbers."""

    supervision: SupervisionConfig = Field(default_factory=SupervisionConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    intensity: Intensity = Field(default_factory=Intensity)
    patch: tuple[int, int, int] = Field(default=(96, 96, 96), description="voxels z, y, x")
    batch_size: int = Field(default=2, ge=1, description="patches a step, of all processes")
    steps: int = Field(default=20_000, ge=1, description="of the whole training")
    seed: int = Field(default=0, ge=0, description="of weights, patches and augmentation")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    deep_supervision: bool | None = Field(
        default=None,
        description="train all outputs of the network; null: where it has several; true: it must",
    )
    optimiser: OptimiserConfig = Field(default_factory=OptimiserConfig)
    validate_every: int = Field(default=1000, ge=1, description="steps between validations")

    @model_validator(mode="after")
    def _legal(self) -> TrainingConfig:
        if self.augment.moves_voxels and self.supervision.uses_features:
            raise ValueError(
                f"{FEATURES_STAY}: set augment.flip_axes and augment.rotate_axes to [] and "
                "augment.affine.probability to 0, or supervision.features.weight to 0"
            )
        return self


def run_digest(config: TrainingConfig, inputs: Mapping[str, Any]) -> str:
    """Digest of all that determines a training's outcome."""
    return digest({"config": config.model_dump(mode="json"), "inputs": dict(inputs)})
