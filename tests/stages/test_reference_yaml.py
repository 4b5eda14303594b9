"""The annotated YAML beside each stage says what the defaults are; here it is held to that."""

from __future__ import annotations

from pathlib import Path

import pytest

import stages
from pipeline.config import Config, load_config
from stages.cache_teachers import CacheTeachersConfig
from stages.evaluate import EvaluateConfig
from stages.export import ExportConfig
from stages.predict import PredictConfig
from stages.train_student import TrainStudentConfig
from stages.train_teachers import TrainTeachersConfig

FOLDER = Path(stages.__file__).parent


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("cache_teachers", CacheTeachersConfig),
        ("evaluate", EvaluateConfig),
        ("export", ExportConfig),
        ("predict", PredictConfig),
        ("train_student", TrainStudentConfig),
        ("train_teachers", TrainTeachersConfig),
    ],
)
def test_every_value_in_the_reference_file_is_the_default(name: str, model: type[Config]) -> None:
    assert load_config(FOLDER / f"{name}.yaml", model) == model()


def test_every_reference_file_is_tested() -> None:
    marked = test_every_value_in_the_reference_file_is_the_default.pytestmark[0]  # type: ignore[attr-defined]
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert {n for n in names if "." not in n} == {row[0] for row in marked.args[1]}
    # Others are for some hardware, and tested in test_hardware_yaml.py.
    hardware = ("24gb", "80gb", "cpu")
    assert {n for n in names if "." in n} == {f"train_student.{kind}" for kind in hardware}
