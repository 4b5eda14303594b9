"""What a made-up patient is made of: tissues in Hounsfield units, and what is drawn once a case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LIVER: Final = 1
SPLEEN: Final = 2
KIDNEYS: Final = 3
PANCREAS: Final = 4

PHASES: Final = ("native", "arterial", "portal")
TISSUE_HU: Final[dict[str, tuple[float, float, float]]] = {
    "liver": (56, 70, 106),
    "spleen": (48, 112, 114),
    "cortex": (34, 160, 165),
    "medulla": (32, 80, 150),
    "pancreas": (40, 95, 86),
    "aorta": (42, 290, 150),
    "cava": (42, 75, 138),
    "portal": (42, 115, 158),
    "muscle": (52, 58, 64),
    "gut": (38, 72, 84),
    "heart": (42, 190, 130),
}
GUT_CONTENTS_HU: Final = ((12, 6), (45, 18), (75, 25), (10, 70), (230, 50))


@dataclass(frozen=True)
class Patient:
    """What is drawn once per case and is no shape.

    Attributes:
        hu: tissue -> Hounsfield units, the keys of `TISSUE_HU`.
        fat_mm: thickness of the fat under the skin.
        gap_mm: thickness of the fat between organs; 0 where organs touch.
        wall_mm: thickness of the muscle wall.
        mean_lesions: how diseased: 1 stands for about three lesions in a case.
        contents: share of fluid, food, dense food, stool and positive contrast in the gut.
    """

    hu: dict[str, float]
    fat_mm: float
    gap_mm: float
    wall_mm: float
    mean_lesions: float
    contents: tuple[float, ...]
