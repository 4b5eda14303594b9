from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from pipeline.data.entries import TeacherEntry
from pipeline.data.volume import Grid, Volume
from pipeline.errors import ConfigError, PipelineError, TeacherError
from pipeline.teachers.factory import FactoryTeacher
from tests.unit.teachers.teacher_contract import TeacherContract, opened, refusal

MODULE = "tests.unit.teachers.made_teachers"
IMAGE = Volume(
    np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4), Grid.axis_aligned((6, 5, 4), (3, 2, 2))
)


def entry(function: str, **changes: Any) -> TeacherEntry:
    values = {"kind": "factory", "weights": "weights.bin", "organs": {"liver": 1}}
    return TeacherEntry.model_validate({**values, "factory": function, **changes})


def load(tmp_path: Path, function: str = f"{MODULE}:threshold", **changes: Any) -> FactoryTeacher:
    (tmp_path / "weights.bin").write_bytes(b"w")
    return opened(FactoryTeacher, entry(function, **changes), tmp_path / "weights.bin")


def refused(tmp_path: Path, match: str, function: str, **changes: Any) -> None:
    refusal(match, f"teacher mine ({function})", lambda: load(tmp_path, function, **changes))


class TestFactory(TeacherContract):
    organs: ClassVar = {"liver": 1}
    num_channels = 2
    tap = "half"
    numbers = ({"args": {"hu": 51}}, {"spacing_mm": [3, 3, 3]}, {"taps": ["half"]})

    def entry(self, **changes: Any) -> TeacherEntry:
        return entry(f"{MODULE}:threshold", **changes)

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        (tmp_path / "weights.bin").write_bytes(b"w")
        return tmp_path / "weights.bin"


def test_what_it_gives(tmp_path: Path) -> None:
    teacher = load(tmp_path, args={"hu": 50}, taps=["half"], spacing_mm=[3, 2, 2])
    assert teacher.spacing_mm == (3, 2, 2)
    prediction = teacher.predict(IMAGE)
    assert prediction.logits.array.dtype == np.float32
    np.testing.assert_allclose(prediction.logits.array[1], (IMAGE.array - 50) / 100, atol=1e-6)
    assert prediction.features["half"].array.dtype == np.float32
    assert prediction.features["half"].grid == IMAGE.grid.coarsen((2, 2, 2))


def test_without_a_spacing_it_gets_the_images_own_grid(tmp_path: Path) -> None:
    assert load(tmp_path).spacing_mm is None


def test_features_that_nobody_asked_for_are_dropped(tmp_path: Path) -> None:
    teacher = load(tmp_path, taps=["a", "b"])
    teacher.entry = teacher.entry.model_copy(update={"taps": ("b",)})
    assert list(teacher.predict(IMAGE).features) == ["b"]


def test_its_code_is_digested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "some_factory.py"
    source = f"from {MODULE} import threshold as make\n"
    module.write_text(source)
    first = load(tmp_path, "some_factory:make").describe()["code_sha256"]
    module.write_text(f"{source}# changed\n")
    assert load(tmp_path, "some_factory:make").describe()["code_sha256"] != first


@pytest.mark.parametrize(
    ("function", "args", "match"),
    [
        ("no_such_module:make", {}, "cannot be imported.*no_such_module"),
        (f"{MODULE}:no_such_function", {}, "cannot be imported.*no_such_function"),
        ("broken_factory:make", {}, "cannot be imported.*division by zero"),
        (f"{MODULE}:NOT_CALLABLE", {}, "factory failed.*not callable"),
        (f"{MODULE}:failing", {}, "factory failed.*licence server"),
        (f"{MODULE}:threshold", {"colour": 1}, "unexpected keyword"),
    ],
)
def test_a_factory_that_gives_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, args: Any, match: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_factory.py").write_text("1 / 0\n")
    refused(tmp_path, match, function, args=args)


@pytest.mark.parametrize(
    ("how", "taps", "kind", "match"),
    [
        ("array", [], TeacherError, "must return a Prediction"),
        ("no channels", [], TeacherError, "must return a Prediction"),
        ("well", ["a", "b"], TeacherError, r"no features for taps \['a', 'b'\]"),
        ("raise", [], TeacherError, "RuntimeError: out of memory"),
        ("pipeline error", [], ConfigError, "my own words"),
    ],
)
def test_a_prediction_that_is_none(
    tmp_path: Path, how: str, taps: list[str], kind: type[PipelineError], match: str
) -> None:
    teacher = load(tmp_path, f"{MODULE}:poor", args={"how": how}, taps=taps)
    with pytest.raises(kind, match=match):
        teacher.predict(IMAGE)
