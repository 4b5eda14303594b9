"""The process of one part. `python -m benchmarks.against_nnunet.job REQUEST`; REQUEST is the JSON
that the bench writes. What is there is kept: a JSON is written last, and says so."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.cohort import raise_failed
from benchmarks.against_nnunet import nnunet, ours
from benchmarks.against_nnunet.cohorts import SIZES, Place, Size, make
from benchmarks.against_nnunet.nnunet import Model
from pipeline.cache.store import write_json
from pipeline.errors import PipelineError
from pipeline.folder import json_with
from pipeline.log import Log
from stages import evaluate
from stages.evaluate import EvaluateConfig

NNUNET: Mapping[str, Model] = {
    "nnU-Net, hard pseudo-labels": Model("hard"),
    "nnU-Net, ignore label": Model("ignore"),
    "nnU-Net, hard pseudo-labels, our optimiser": Model("hard", our_optimiser=True),
    "nnU-Net, ignore label, our optimiser": Model("ignore", our_optimiser=True),
}
_MIB = 1024


def main(path: Path) -> int:
    """The exit code is 0 if the part is done."""
    torch.set_num_threads(1)
    request, log = json.loads(path.read_text(encoding="utf-8")), Log()
    size = SIZES[request["cohort"], request["size"]]
    place = Place(Path(request["folder"]), request.get("setting", ""), request["split"])
    try:
        if request["part"] == "cohort":
            data = Path(request["data"]) if request["data"] else None
            make(place.folder, size, data, request["seed"], log)
        elif request["part"] == "dataset":
            nnunet.write_datasets(place, log)
            nnunet.prepare(place, size)
        else:
            _row(place, size, request, log)
            return 0
    except PipelineError as error:
        log.warn(str(error))
        return error.exit_code
    write_json(done_file(place, request["part"]), {"done": True})
    return 0


def done_file(place: Place, part: str) -> Path:
    """Says that cohort or dataset is whole."""
    return place.folder / ("made.json" if part == "cohort" else f"dataset-{place.setting}.json")


def row_folder(place: Place, row: str) -> Path:
    """Where a row's results are."""
    return place.folder / "rows" / place.setting / re.sub("[^A-Za-z0-9]+", "-", row).strip("-")


def variants(row: str) -> Sequence[str]:
    """Ways to predict, the usual one first."""
    return ("mirrored", "plain") if row in NNUNET else tuple(ours.variants(row))


def read(place: Place, row: str, variant: str) -> dict[str, Any] | None:
    """`seconds_per_case` and `rows` of what was predicted and scored; None: not yet."""
    path = row_folder(place, row) / f"{place.split}-{variant}.json"
    return json_with(path, "rows", "seconds_per_case")


def trained(place: Place, row: str) -> dict[str, Any] | None:
    """What is known of a finished training; None: not yet."""
    return json_with(row_folder(place, row) / "train.json", "steps")


def _row(place: Place, size: Size, request: Mapping[str, Any], log: Log) -> None:
    row, folder = request["row"], row_folder(place, request["row"])
    folder.mkdir(parents=True, exist_ok=True)
    model = NNUNET.get(row)
    if trained(place, row) is None:
        seconds, seed = request["seconds"], request["seed"]
        if model is not None:
            told = nnunet.train(place, model, size, seconds, seed)
        else:
            told = ours.train(place, size, row, seconds, seed, folder / "speed.json")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB
        write_json(folder / "train.json", {**told, "peak_mib": peak})
    for variant in variants(row):
        if read(place, row, variant) is not None:
            continue
        output = folder / f"{place.split}-{variant}"
        if model is not None:
            mirror = variant == "mirrored"
            found = nnunet.predict(place, model, size, output, mirror=mirror)
        else:
            found = ours.predict(place, row, variant, output, log)
        rows = _scored(place, output, log)
        write_json(output.with_name(f"{output.name}.json"), {**found, "rows": rows})


def _scored(place: Place, output: Path, log: Log) -> list[dict[str, Any]]:
    """`pipeline evaluate` of label maps, whoever wrote them."""
    registry, _, _ = place.scored()
    config = EvaluateConfig(splits=(place.split,), surface=False)
    raise_failed(evaluate.run(config, registry, output, log=log, table=False))
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return [
        {"case": row["case"], "organ": organ, **{k: metrics[k] for k in ("Dice", "n_ref")}}
        for row in summary["metric_per_case"]
        for organ, label in summary["organs"].items()
        if (metrics := row["metrics"][str(label)])["n_ref"] > 0
    ]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
