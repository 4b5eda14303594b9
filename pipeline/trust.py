"""How far a teacher is believed: the settings, and the outcome for one organ in one case."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field

from pipeline.config import Config


class ReliabilityConfig(Config):
    """When the word of a teacher counts.

    A word that does not count is as if the teacher had not seen the voxel: it is silent there.
    """

    least_found: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description='"not here" counts if the teacher finds this share of its organ',
    )
    least_right: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description='"here" counts if this share of what it claims is the organ',
    )
    plausible: bool = Field(
        default=True, description="a size that no label shows silences one side in that case"
    )
    doubt: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description='p above which the student is believed against a teacher\'s "not here"; '
        "null: never",
    )


class Trust(NamedTuple):
    """Whether a teacher's word counts; the two sides fail independently of each other.

    Attributes:
        here: "the organ is here" (log-odds above 0).
        not_here: "it is not here" (all else).
        why: in words, where a side does not count.
    """

    here: bool = True
    not_here: bool = True
    why: str = ""

    @property
    def silent(self) -> bool:
        """Whether nothing that it says counts: as if it had no unit of the case."""
        return not (self.here or self.not_here)


FULL = Trust()
