"""`--dry-run` writes nothing, for every command that has it; `--report` is the one file more."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from pipeline.cli.app import app
from pipeline.data.entries import PhantomSpec
from tests.stages.stage_contract import snapshot
from tests.stages.test_predict import write_student
from tests.stages.test_train_student import settings as student_settings
from tests.tiny import RunCli, cache_config, change_registry, training_settings, work_of

# Command -> its arguments, besides --dry-run; {} stands for the folder of the registry.
ARGUMENTS = {
    "phantom": "-r {}/phantom.yaml",
    "train-teachers": "-r {}/data_registry.yaml -c {}/teachers.yaml -w {}/new --device cpu "
    "--only spleen",
    "cache-teachers": "-r {}/data_registry.yaml -c {}/cache.yaml -w {}/new --device cpu",
    "train-student": "-r {}/data_registry.yaml -c {}/student.yaml -w {}/work --device cpu",
    "predict": "{}/student.pt -r {}/data_registry.yaml -o {}/predictions --device cpu",
    "export": "{}/student.pt -f torchscript -f onnx -o {}/exported "
    "--check-on {}/data/multi-ct/images/case_001.nii.gz",
    "evaluate": "{}/predictions -r {}/data_registry.yaml",
    "compare": "{}/student.yaml {}/other.yaml -r {}/data_registry.yaml -w {}/work -o {}/compared "
    "--seeds 0 --device cpu",
    "submit": "train-student evaluate -r {}/data_registry.yaml -w {}/work",
    "cache gc": "{}/fewer.yaml -w {}/work --grace-hours 0 --yes",
    "init": "-d mine={}/data/liver-ct:liver=1 --organ liver -r {}/mine.yaml",
}

# What their reports say.
TO_DO = {
    "train-teachers": ["spleen"],
    "train-student": ["student"],
    "evaluate": ["multi-ct/case_001", "multi-ct/case_002"],
    "predict": ["multi-ct/case_001", "multi-ct/case_002"],
    "export": ["torchscript", "onnx"],
    "phantom": ["liver-ct"],
}


def commands_with_dry_run(typer_app: typer.Typer = app, prefix: str = "") -> Iterator[str]:
    """As they are typed, groups included."""
    for command in typer_app.registered_commands:
        assert command.callback is not None
        parameters = inspect.signature(command.callback).parameters
        if {"dry_run", "print_"} & set(parameters):
            yield f"{prefix}{command.name or command.callback.__name__.replace('_', '-')}"
    for group in typer_app.registered_groups:
        assert group.typer_instance is not None
        yield from commands_with_dry_run(group.typer_instance, f"{group.name} ")


@pytest.fixture
def place(tiny_cached: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cohort with a filled cache, settings for all stages, a student, and no teacher to spare."""
    folder = tiny_cached.parent
    (folder / "teachers" / "spleen.pt").rename(folder / "kept.pt")
    training = training_settings()
    for name, content in {
        "teachers.yaml": {"training": training},
        "cache.yaml": cache_config().model_dump(mode="json"),
        "student.yaml": student_settings().model_dump(mode="json"),
        "other.yaml": student_settings("marginal").model_dump(mode="json") | {"run": "other"},
    }.items():
        (folder / name).write_text(yaml.safe_dump(content))
    for name in ("phantom.yaml", "fewer.yaml"):
        (folder / name).write_text(tiny_cached.read_text())
    change_registry(folder / "fewer.yaml", lambda data: data["teachers"].pop("spleen"))
    spec = PhantomSpec(num_cases=1, seed=1, annotated=("liver",), shape=(16, 16, 16))

    def made_up(data: dict[str, dict[str, dict[str, object]]]) -> None:
        data["datasets"]["liver-ct"] |= {"phantom": spec.model_dump(mode="json"), "root": "made"}

    change_registry(folder / "phantom.yaml", made_up)
    write_student(folder / "student.pt", organs={"liver": 1, "spleen": 2})
    (folder / "predictions").mkdir()
    monkeypatch.chdir(folder)
    return tiny_cached


def test_every_command_that_has_it_is_tried() -> None:
    assert set(commands_with_dry_run()) == set(ARGUMENTS)


@pytest.mark.parametrize("command", ARGUMENTS)
def test_it_writes_nothing(place: Path, command: str, run_cli: RunCli) -> None:
    folder = place.parent
    if command == "cache-teachers":
        (folder / "kept.pt").rename(folder / "teachers" / "spleen.pt")
    before = snapshot(folder)
    arguments = ARGUMENTS[command].replace("{}", str(folder)).split(" ")
    report = folder.parent / "run.json"
    run = (*command.split(" "), *arguments, "--dry-run", "--report", str(report))
    code, out, err = run_cli(*run)
    assert code == 0, err
    assert snapshot(folder) == before
    assert (out + err).strip()  # it says something
    found = json.loads(report.read_text())
    assert (found["command"], found["exit_code"]) == (command, 0)
    assert found["dry_run"]
    assert work_of(place).exists()
    if command in TO_DO:
        assert found["units"]["done"] == TO_DO[command]
        to_do = f"{len(TO_DO[command])} to do"
        assert f"{command}: dry run, nothing is written; {to_do}" in err
