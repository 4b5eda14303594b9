"""Teachers in `pipeline check`: a row each; a bad one neither hides nor stops the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.schema import StorageConfig
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import load_registry
from pipeline.data.volume import Grid, Orientation, Volume
from pipeline.errors import RegistryError
from pipeline.log import Log
from pipeline.setup.check.cases import CaseFacts
from pipeline.setup.check.cohort import DataReport
from pipeline.setup.check.report import Report, print_report
from pipeline.setup.check.teachers import CheckReport, TeacherCheck, check_teachers, middle
from pipeline.teachers.load import Teachers
from tests.stages.test_cache_teachers_input import factory, keep
from tests.stages.test_teacher_kinds import bundle, exported, with_softmax
from tests.tiny import GRID_MM, TAP, WINDOW, RunCli, change_registry, teacher_data, work_of


def check(registry: Path, **options: Any) -> CheckReport:
    window = WindowConfig(shape=WINDOW, overlap=0.25)
    teachers = Teachers(load_registry(registry), window, StorageConfig(), "cpu", 1)
    return check_teachers(teachers, Log(quiet=True), **options)


@pytest.fixture
def mixed(tiny_registry: Path) -> Path:
    """Four kinds that work, and three teachers that do not, each in its own way."""
    teachers = {
        "liver": teacher_data("liver"),
        "absent": {**teacher_data("liver"), "weights": "teachers/none.pt"},
        "zoo": bundle(tiny_registry),
        "wrong": {**exported(tiny_registry), "num_channels": 2, "organs": {"liver": 1}},
        "net": exported(tiny_registry),
        "broken": factory("poor", args={"how": "nan"}),
        "soft": factory("threshold", args={"hu": 0}),
    }
    return keep(tiny_registry, "liver-ct", **teachers)


def test_every_teacher_has_its_row(mixed: Path) -> None:
    report = check(mixed)
    rows = {row.teacher: row for row in report.teachers}
    assert list(rows) == ["liver", "absent", "zoo", "wrong", "net", "broken", "soft"]
    assert {name for name, row in rows.items() if row.problem} == {"absent", "wrong", "broken"}
    assert report.num_failed == 3
    assert "do not exist" in str(rows["absent"].problem)
    assert "emits 3 channels" in str(rows["wrong"].problem)
    assert "broken x liver-ct/case_000" in str(rows["broken"].problem)
    assert report.case == "liver-ct/case_000"
    liver, zoo, net, soft = (rows[name] for name in ("liver", "zoo", "net", "soft"))
    assert (liver.num_channels, zoo.num_channels, net.num_channels, soft.num_channels) == (
        2, 3, 3, 2,
    )  # fmt: skip
    assert zoo.organs == {"liver": (1,), "spleen": (2,)}
    assert set(zoo.organ_ml) == {"liver", "spleen"}
    np.testing.assert_allclose(liver.spacing_mm, GRID_MM)
    np.testing.assert_allclose(zoo.spacing_mm, (13, 11, 11))
    np.testing.assert_allclose(net.spacing_mm, (13, 11, 11))
    np.testing.assert_allclose(soft.spacing_mm, report.crop_spacing_mm)
    assert liver.taps[TAP][0] == 8
    assert -1 <= liver.agreement[TAP] <= 1
    assert list(zoo.agreement) == list(zoo.taps)
    assert len(zoo.taps[TAP]) == 4
    assert net.taps == {}
    assert all(row.seconds is not None and row.seconds >= 0 for row in (liver, zoo, net, soft))
    json.dumps(report.to_json())


def test_outputs_that_are_no_logits_are_an_error_of_their_teacher(tiny_registry: Path) -> None:
    net = exported(tiny_registry)
    teachers = {
        "net": net,
        "soft": with_softmax(tiny_registry, net),
        "said": {**with_softmax(tiny_registry, net), "outputs": "probabilities"},
        "own": factory("sure"),
        "hot": factory("sure", args={"how": "one-hot"}, outputs="probabilities"),
    }
    keep(tiny_registry, "liver-ct", **teachers)
    rows = {row.teacher: row for row in check(tiny_registry).teachers}
    assert {name for name, row in rows.items() if row.problem} == {"soft", "own", "hot"}
    for name in ("soft", "own"):
        assert "are probabilities, not logits" in str(rows[name].problem)
        assert "`outputs: probabilities`" in rows[name].fix
    assert "one-hot" in str(rows["hot"].problem)
    assert rows["said"].organ_ml == rows["net"].organ_ml


def test_what_is_only_improbable_is_a_warning(tiny_registry: Path, run_cli: RunCli) -> None:
    keep(tiny_registry, "liver-ct", odd=factory("sure", args={"how": "undecided"}))
    config = tiny_registry.parent / "stage.yaml"
    config.write_text(f"window: {{shape: {list(WINDOW)}, overlap: 0.25}}\n")
    arguments = ["check", "-r", str(tiny_registry), "-c", str(config), "--jobs", "1", "--json"]
    code, out, err = run_cli(*arguments)
    (found,) = [f for f in json.loads(out)["findings"] if f["kind"] == "teacher"]
    assert (found["severity"], found["where"]) == ("warning", "teacher odd")
    assert "all outputs lie in [0, 1]. If they are probabilities" in found["what"]
    assert found["fix"]
    assert (code, err) == (0, "")


def test_a_chosen_case_and_size(tiny_registry: Path) -> None:
    report = check(tiny_registry, case="multi-ct/case_001", side_mm=60)
    assert report.case == "multi-ct/case_001"
    sides = np.array(report.crop_shape) * np.array(report.crop_spacing_mm)
    assert (np.abs(sides - 60) <= np.array(report.crop_spacing_mm)).all()


def test_a_case_that_cannot_be_read_is_passed_over(tiny_registry: Path) -> None:
    images = sorted((tiny_registry.parent / "data" / "liver-ct" / "images").iterdir())
    images[0].write_bytes(b"no image")
    assert check(tiny_registry).case == "liver-ct/case_001"
    with pytest.raises(RegistryError, match=r"no case that can be read: .*case_000"):
        check(tiny_registry, case="liver-ct/case_000")


def test_nothing_to_check(tiny_registry: Path) -> None:
    with pytest.raises(RegistryError, match="there is no case 'liver-ct/none'"):
        check(tiny_registry, case="liver-ct/none")
    change_registry(tiny_registry, lambda data: data.pop("teachers"))
    with pytest.raises(RegistryError, match="no teachers to check"):
        check(tiny_registry)


def test_the_crop_keeps_geometry_and_storage_order() -> None:
    stored = Orientation.from_code("LPS")
    grid = Grid.axis_aligned((10, 20, 30), (3, 2, 1), (7, 8, 9))
    image = replace(Volume(np.arange(6000).reshape(10, 20, 30), grid), stored=stored)
    crop = middle(image, 12)
    assert crop.grid.shape == (4, 6, 12)
    assert crop.stored == stored
    np.testing.assert_array_equal(crop.array, image.array[3:7, 7:13, 9:21])
    assert crop.grid == grid.crop((3, 7, 9), (4, 6, 12))
    assert middle(image, 1000).grid == grid


def test_on_the_command_line(mixed: Path, run_cli: RunCli) -> None:
    config = mixed.parent / "stage.yaml"
    config.write_text(f"window: {{shape: {list(WINDOW)}, overlap: 0.25}}\n")
    arguments = ["check", "-r", str(mixed), "-c", str(config), "--device", "cpu", "--jobs", "1"]
    code, out, _ = run_cli(*arguments)
    assert code == 2
    assert out.count("ok") >= 4
    assert "Findings" in out
    assert "emits 3 channels" in out
    code, out, err = run_cli(*arguments, "--json")
    assert code == 2
    found = json.loads(out)
    assert found["teachers"]["num_failed"] == 3
    wrong = {f["where"] for f in found["findings"] if f["kind"] == "teacher"}
    # Of the fourth, whose weights are drawn, the tap does not agree with itself: a warning.
    assert wrong == {"teacher absent", "teacher wrong", "teacher broken", "teacher zoo"}
    assert err == ""
    assert not work_of(mixed).exists()


def test_trust_on_the_command_line(tiny_registry: Path, run_cli: RunCli) -> None:
    keep(tiny_registry, "liver-ct", zoo=bundle(tiny_registry))
    config = tiny_registry.parent / "teachers" / "zoo" / "configs" / "inference.json"
    config.write_text(
        config.read_text().replace('"norm": "instance"', '"norm": "$str(\'instance\')"')
    )
    arguments = ["check", "-r", str(tiny_registry), "--device", "cpu", "--jobs", "1"]
    code, out, _ = run_cli(*arguments)
    assert code == 2
    assert "--trust" in out
    code, out, _ = run_cli(*arguments, "--trust", "zoo")
    assert code == 0
    assert "0 errors" in out
    code, _, err = run_cli(*arguments, "--trust", "zo")
    assert code == 2
    assert "there is no teacher 'zo' to trust" in err


def test_files_in_several_orders_of_axes_for_teachers_that_know_one(
    tiny_registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def looked_at(orders: dict[str, str]) -> Report:
        kinds = {"a": "stored", "b": "stored", "told": "IPL", "zoo": ""}
        rows = [TeacherCheck(name, "nnunet", {}, orientation=o) for name, o in kinds.items()]
        facts = [CaseFacts(f"{d}/0", d, "train", stored=code) for d, code in orders.items()]
        data = DataReport(list(orders), facts, len(facts), [])
        teachers = CheckReport("liver-ct/0", (2, 2, 2), (1, 1, 1), "cpu", rows)
        return Report(load_registry(tiny_registry), data, teachers)

    assert looked_at({"liver-ct": "LPS", "spleen-ct": "LPS"}).findings == []
    report = looked_at({"liver-ct": "LPS", "spleen-ct": "IPL"})
    assert [found.where for found in report.findings] == ["teacher a", "teacher b"]
    assert "that differs: liver-ct LPS, spleen-ct IPL." in report.findings[0].what
    assert report.exit_code == 0
    print_report(report)
    assert capsys.readouterr().out.count("nnU-Net does not") == 1
