"""How hard the phantom is: the demo's budget, fully supervised, over seeds.

The four datasets of the reference registry are generated with all organs annotated, so that the
same CTs, splits, network, steps and test cases as in `pipeline demo` give the upper bound that
full labels reach. Phantom, split and network are re-drawn per seed.

    python -m benchmarks.phantom_difficulty FOLDER --seeds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from pipeline.cli.demo import generate_phantoms, write_settings
from pipeline.config import load_config
from pipeline.data.entries import ORGANS
from pipeline.data.registry import load_registry
from pipeline.engine.here import Execution
from pipeline.log import Log, print_table
from pipeline.review.metrics import organ_means
from pipeline.student.speed import TrainingExecution
from stages import cache_teachers, evaluate, predict, train_student
from stages.report import Scope


def main() -> None:
    """Prints test Dice per organ and seed, and the mean over organs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = [one_seed(arguments.folder / f"seed{s}", s) for s in range(arguments.seeds)]
    rows = [
        [f"seed {seed}", *(f"{organ_means(r)[o]['Dice']:.3f}" for o in ORGANS), f"{_mean(r):.3f}"]
        for seed, r in enumerate(results)
    ]
    means = [_mean(r) for r in results]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    print_table("Test Dice, fully supervised in the demo's budget", ["", *ORGANS, "mean"], rows)
    print(f"mean {statistics.mean(means):.3f}, standard deviation over seeds {spread:.3f}")


def one_seed(folder: Path, seed: int) -> dict[str, Any]:
    """One cohort, one student, one summary."""
    log = Log()
    write_settings(folder, quick=False)
    path = folder / "data_registry.yaml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["teachers"] = {}
    for entry in data["datasets"].values():
        entry["annotated"] = {organ: k + 1 for k, organ in enumerate(ORGANS)}
        entry["phantom"] |= {"annotated": list(ORGANS), "seed": entry["phantom"]["seed"] + seed}
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    assert not generate_phantoms(load_registry(path, files=False), log).failed
    registry = load_registry(path)
    work = folder / "work"
    scope = Scope(registry, work, log, tables=False)
    cache_teachers.run(cache_teachers.CacheTeachersConfig(), scope, Execution())
    settings = yaml.safe_load((folder / "train_student_marginal.yaml").read_text(encoding="utf-8"))
    settings["run"] = "full"
    settings["training"] |= {"supervision": {"kind": "full"}, "seed": seed}
    config = folder / "train_student_full.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    full = load_config(config, train_student.TrainStudentConfig)
    train_student.run(full, Scope(registry, work, log), TrainingExecution())
    cases = [c for d in registry.datasets for c in registry.cases(d) if c.split == "test"]
    output = folder / "predictions"
    predict.run(
        predict.PredictConfig(),
        work / "students" / "full" / "student.pt",
        predict.Inputs({case.name: case.image for case in cases}),
        output,
        log=log,
    )
    evaluate.run(evaluate.EvaluateConfig(surface=False), registry, output, log=log, table=False)
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return summary


def _mean(summary: dict[str, Any]) -> float:
    return float(summary["foreground_mean"]["Dice"])


if __name__ == "__main__":
    main()
