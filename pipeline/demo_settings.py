"""Registry and configurations of the demo: the reference registry, and settings that fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError
from pipeline.folder import refuse_foreign, replace_file, writing

STUDENTS = ("ms_kd", "pseudo_label", "marginal")
_PATCH = [32, 40, 40]
_STUDENT_TAP = "model.1.submodule.1.submodule.2"


def write_settings(folder: Path, *, quick: bool) -> Path:
    """Writes registry and configurations of the demo; returns the registry's path.

    Raises:
        ConfigError: the folder holds another demo, or files that are no demo's.
    """
    data = yaml.safe_load(reference_registry().read_text(encoding="utf-8"))
    if quick:
        _shrink(data)
    registry = folder / "data_registry.yaml"
    if registry.exists() and yaml.safe_load(registry.read_text(encoding="utf-8")) != data:
        raise ConfigError(
            "there is a demo of another size or version in this folder.",
            where=folder,
            fix="Name another folder, or remove this one.",
        )
    if not registry.exists():
        named = ("phantom", "work", "kinds", "predictions", "overlay.png", *map(_student, STUDENTS))
        targets = [folder / name for name in (*named, "train_teachers.yaml", "cache_teachers.yaml")]
        refuse_foreign("demo", [(path, False) for path in targets], fix="Name another folder.")
    _write_yaml(registry, data)
    steps = 8 if quick else 300
    training = {"patch": _PATCH, "batch_size": 2, "validate_every": 100}
    _write_yaml(
        folder / "train_teachers.yaml",
        {"training": {**training, "steps": steps, "optimiser": {"lr": 0.003}}},
    )
    window = {"shape": _PATCH, "overlap": 0.5}
    _write_yaml(folder / "cache_teachers.yaml", {"window": window})
    for kind in STUDENTS:
        supervision: dict[str, Any] = {"kind": kind}
        if kind == "ms_kd":
            supervision["features"] = {"student_taps": [_STUDENT_TAP]}
        student = {
            **training,
            "steps": 8 if quick else 450,
            "optimiser": {"lr": 0.003},
            "supervision": supervision,
        }
        _write_yaml(folder / _student(kind), {"run": kind, "training": student})
    return registry


def reference_registry() -> Path:
    """The annotated reference registry: beside the packages in a checkout, within them in a wheel.

    Raises:
        ConfigError: the installation lacks it.
    """
    package = Path(__file__).parent
    for path in (package.parent / "data_registry.yaml", package / "data" / "data_registry.yaml"):
        if path.is_file():
            return path
    raise ConfigError(
        "the reference registry is not installed.",
        where="data_registry.yaml",
        fix="Install organ-distill again.",
    )


def _shrink(data: dict[str, Any]) -> None:
    # After eight steps no teacher finds its organ: any threshold of the gate would stop the demo.
    data["admission"]["dice"] = 0.0
    for entry in data["datasets"].values():
        entry["phantom"] |= {"num_cases": 3, "shape": [24, 28, 32]}
        if "train" in entry["split"]:
            entry["split"] = {"train": [], "validation": ["case_000"], "test": ["case_001"]}
    data["grid"]["spacing_mm"] = [12.0, 12.0, 12.0]
    data["teachers"]["liver"]["spacing_mm"] = [12.0, 12.0, 12.0]


def _student(kind: str) -> str:
    return f"train_student_{kind}.yaml"


def _write_yaml(path: Path, data: Any) -> None:
    """One that somebody changed to try other settings stays."""
    text = yaml.safe_dump(data, sort_keys=False)
    if not path.exists():
        with writing(path):
            replace_file(path, text.encode())
    elif yaml.safe_load(path.read_text(encoding="utf-8")) != data:
        raise ConfigError(
            "these are not the settings of this demo, and they are not replaced.",
            where=path,
            fix="Run the stages by hand with them, or name another folder.",
        )
