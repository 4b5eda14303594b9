"""Cases by hand: what each teacher says and what the label says, voxel by voxel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.cache.reader import CachedCase, Unit
from pipeline.cache.schema import StorageConfig, image_spec, label_spec, log_odds_spec
from pipeline.cache.store import write_unit
from pipeline.data.labels import LabelSpace
from pipeline.data.volume import Grid

Array = npt.NDArray[Any]
SPACE = LabelSpace({"liver": 1, "spleen": 5, "kidneys": 7})
EXACT = StorageConfig(chunk=8, log_odds_bits=10)
# 10 mm voxels: one is 1 ml.
SPACING_MM = (10.0, 10.0, 10.0)


def made_case(
    folder: Path,
    name: str,
    votes: Mapping[tuple[str, str], Array],
    label: Array,
    annotated: Sequence[str],
    *,
    split: str = "train",
) -> CachedCase:
    """Writes and opens a case; `votes` are (teacher, organ) -> log-odds (D, H, W)."""
    shape = label.shape
    grid = Grid.axis_aligned(shape, SPACING_MM, (-30.0, 40.0, 5.0))
    sizes = {organ: int((label == SPACE.ids[organ]).sum()) for organ in annotated}
    attributes = {"grid": grid.to_json(), "centres": {}, "taps": {}, "organ_voxels": sizes}

    def write(path: Path, specs: Any) -> Unit:
        write_unit(path, specs, attributes, {"path": str(path)}, storage=EXACT)
        return Unit.open(path)

    image = np.arange(label.size).reshape(shape).astype(np.int16)
    case = write(
        folder / "cases" / f"{name}.zarr", [image_spec(image), label_spec(label.astype(np.uint8))]
    )
    units = {
        teacher: write(
            folder / "teachers" / teacher / f"{name}.zarr",
            [
                log_odds_spec(organ, odds.astype(np.float32), EXACT)
                for (who, organ), odds in votes.items()
                if who == teacher
            ],
        )
        for teacher in dict.fromkeys(teacher for teacher, _ in votes)
    }
    experts = {o: [t for t, of in votes if of == o] for o in SPACE.organs}
    return CachedCase(name, split, tuple(annotated), case, units, experts)


def random_case(folder: Path, *, seed: int = 0) -> tuple[CachedCase, dict[Any, Array], Array]:
    """Two experts of the liver, one teacher of liver and spleen, one of kidneys; 11 x 9 x 10."""
    rng = np.random.default_rng(seed)
    shape = (11, 9, 10)
    who = [("one", "liver"), ("two", "liver"), ("two", "spleen"), ("three", "kidneys")]
    votes = {}
    for key in who:
        odds = rng.normal(scale=4, size=shape).astype(np.float16)
        odds[rng.random(shape) < 0.1] = np.nan
        votes[key] = odds
    label = rng.choice([0, 1, 255], p=[0.5, 0.4, 0.1], size=shape)
    return made_case(folder, "made/case", votes, label, ["liver"]), votes, label
