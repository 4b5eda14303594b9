"""How large the cases of a registry are, from headers alone; two of them to try things on, and
parts of them that take about as long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.data.entries import CaseFiles
from pipeline.data.nifti import read_grid
from pipeline.data.registry import Registry
from pipeline.data.volume import Grid
from pipeline.engine.parts import Part, share
from pipeline.errors import PipelineError, RegistryError


@dataclass(frozen=True)
class CaseSize:
    """A case, its image's own grid in RAS+, and its student grid."""

    source: CaseFiles
    native: Grid
    grid: Grid

    @property
    def native_voxels(self) -> int:
        """Voxels of the CT as it is stored."""
        return math.prod(self.native.shape)

    @property
    def voxels(self) -> int:
        """Voxels on the student grid."""
        return math.prod(self.grid.shape)


def case_sizes(
    registry: Registry, splits: Sequence[str]
) -> tuple[list[CaseSize], Mapping[str, PipelineError]]:
    """Reads the header of every image of some splits: the cases, and per case whose header cannot
    be read the reason."""
    found: list[CaseSize] = []
    unreadable: dict[str, PipelineError] = {}
    for dataset in registry.datasets:
        for source in registry.cases(dataset):
            if source.split not in splits:
                continue
            try:
                native = read_grid(source.image)
            except PipelineError as error:
                unreadable[source.name] = error
            else:
                grid = native.with_spacing(registry.grid.spacing_mm)
                found.append(CaseSize(source, native, grid))
    return found, unreadable


def two_cases(sizes: Sequence[CaseSize]) -> list[CaseSize]:
    """The case of median size and the largest one, of two datasets where there are two.

    The largest shows the most memory that is needed; datasets differ in noise, and with it in how
    well they compress.

    Raises:
        RegistryError: there is no case.
    """
    if not sizes:
        raise RegistryError(
            "there is no case whose header can be read.",
            where="the registry's datasets",
            fix="Check `splits` and the dataset's files; a phantom is made by `pipeline phantom`.",
        )
    ordered = sorted(sizes, key=lambda c: (c.voxels, c.native_voxels, c.source.name))
    largest = ordered[-1]
    elsewhere = [c for c in ordered if c.source.dataset != largest.source.dataset]
    others = elsewhere or ordered[:-1]
    return [others[len(others) // 2], largest] if others else [largest]


def cases_of_part(
    registry: Registry, files: Sequence[CaseFiles], splits: Sequence[str], part: Part
) -> list[CaseFiles]:
    """The cases of a part, so that all parts take about as long: cost follows the voxels of the CT
    and those on the student grid, by headers alone, and is the same factor for every teacher.

    A case whose header cannot be read belongs to a part too, which reports it.
    """
    sizes, _ = case_sizes(registry, splits)
    known = {size.source.name: float(size.native_voxels + size.voxels) for size in sizes}
    costs = {case.name: known.get(case.name, 1.0) for case in files}
    own = set(share(costs, part.of)[part.number])
    return [case for case in files if case.name in own]
