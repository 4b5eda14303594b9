"""Where patches are taken: organs equally often, however few cases hold them.

No volume is read for it. Stage one wrote voxels of each labelled organ into the case, and of each
teacher's organ region into the teacher's unit; here it is only looked up who has any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field

from pipeline.cache.reader import FULL, CachedCase, Unit
from pipeline.config import Config
from pipeline.data.patches import ENOUGH_IMAGE, FLAT_PATCH, Index3, check_slice, image_share
from pipeline.data.volume import Grid
from pipeline.errors import named

Choice = TypeVar("Choice")


class SamplingConfig(Config):
    """Where patches are taken."""

    foreground: float = Field(
        default=0.67, ge=0, le=1, description="share of patches centred on an organ, organs equal"
    )
    organs_from: Literal["labels", "labels_and_teachers"] = Field(
        default="labels_and_teachers",
        description="whether teachers, too, say where an unannotated organ may be",
    )


class Sampler:
    """Draws a case and a voxel to centre a patch on.

    A share of `foreground`: an organ, then a dataset in which some case has it, then such a case,
    then one of its voxels there. The rest: a dataset, a case, any voxel. Each of them equally often
    among its like.

    Args:
        use_teachers: whether the supervision reads teachers at all; else labels alone say where.

    Raises:
        CacheError: a unit whose attributes cannot be read.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        organs: Sequence[str],
        config: SamplingConfig,
        *,
        use_teachers: bool,
    ) -> None:
        self._config = config
        self._with_teachers = use_teachers and config.organs_from == "labels_and_teachers"
        self._by_dataset: dict[str, list[CachedCase]] = {}
        self._holders: dict[str, dict[str, list[CachedCase]]] = {organ: {} for organ in organs}
        self._shapes: dict[str, Index3] = {}
        for case in cases:
            dataset = case.name.split("/")[0]
            self._by_dataset.setdefault(dataset, []).append(case)
            self._shapes[case.name] = Grid.from_json(case.case.noted["grid"]).shape
            for organ in organs:
                if any(organ in unit.noted["held"] for unit in self._telling(case, organ)):
                    self._holders[organ].setdefault(dataset, []).append(case)

    def check_patch(self, patch: Index3) -> None:
        """Refuses patches that are thicker than a case of one slice.

        Raises:
            GeometryError: names the case.
        """
        for name, shape in self._shapes.items():
            with named(name):
                check_slice(shape, patch, FLAT_PATCH)

    def draw(self, rng: np.random.Generator) -> tuple[CachedCase, Sequence[int]]:
        """A case, and a voxel (z, y, x) of it."""
        held = [organ for organ, holders in self._holders.items() if holders]
        if rng.random() < self._config.foreground and held:
            organ = _pick(held, rng)
            holders = self._holders[organ]
            case = _pick(holders[_pick(sorted(holders), rng)], rng)
            return case, _pick(self._centres(case, organ), rng)
        case = _pick(self._by_dataset[_pick(sorted(self._by_dataset), rng)], rng)
        return case, [int(rng.integers(n)) for n in self._shapes[case.name]]

    def remarks(self, patch: Index3) -> list[str]:
        """What a user should hear before the training starts; a sentence each."""
        found = []
        share = {name: image_share(shape, patch) for name, shape in self._shapes.items()}
        small = [name for name in share if share[name] < ENOUGH_IMAGE]
        if small:
            least = min(small, key=lambda name: share[name])
            found.append(
                f"patch {patch} is far larger than {len(small)} of {len(share)} cases: of "
                f"{least} {self._shapes[least]} at most {share[least]:.0%} of a patch is image, "
                "the rest air that teaches nothing. A smaller `patch` costs less."
            )
        nowhere = [organ for organ, holders in self._holders.items() if not holders]
        if nowhere and self._config.foreground:
            found.append(f"no training case shows {', '.join(nowhere)}: no patch is centred there.")
        return found

    def _centres(self, case: CachedCase, organ: str) -> Sequence[Sequence[int]]:
        """Voxels of an organ, by the units that tell."""
        return [
            point
            for unit in self._telling(case, organ)
            for point in unit.attributes["centres"].get(organ, ())
        ]

    def _telling(self, case: CachedCase, organ: str) -> Sequence[Unit]:
        """Who tells where an organ is: the label where it is annotated, else its teachers."""
        if organ in case.annotated:
            return [case.case]
        if not self._with_teachers:
            return []
        return [
            case.teachers[teacher]
            for teacher in case.experts.get(organ, ())
            if case.trust.get((teacher, organ), FULL).here
        ]


def _pick(among: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return among[int(rng.integers(len(among)))]
