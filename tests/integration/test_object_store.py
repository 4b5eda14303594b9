"""The commands with `--work s3://...`, against a real S3 server in a process of its own; what comes
out is what comes out of a folder on a disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from pipeline.cli import app as cli
from pipeline.errors import PipelineError
from pipeline.folder import read_text, sizes
from pipeline.student.progress import without_timing
from tests.tiny import at_step, cache_config, change_registry, training_settings, work_of

if TYPE_CHECKING:
    from upath import UPath

Run = Callable[..., Result]


@pytest.fixture
def run(tiny_cached: Path, store_work: UPath) -> Run:
    """A command on the copy's registry and the work folder in the store."""

    def call(*arguments: str, work: object = store_work, expect: int = 0) -> Result:
        options = ["-r", str(tiny_cached), "-w", str(work)]
        done = CliRunner().invoke(cli.app, [*arguments, *options])
        error = done.exception
        code = error.exit_code if isinstance(error, PipelineError) else done.exit_code
        assert code == expect, (done.output, error)
        return done

    return call


@pytest.fixture
def settings(tiny_cached: Path) -> dict[str, str]:
    """Stage -> its settings as a file."""
    train = {"run": "student", "training": training_settings(supervision={"kind": "ms_kd"})}
    values = {"cache": cache_config().model_dump(mode="json"), "train": train}
    paths = {}
    for name, value in values.items():
        path = tiny_cached.parent / f"{name}.yaml"
        path.write_text(yaml.safe_dump(value), encoding="utf-8")
        paths[name] = str(path)
    return paths


@pytest.mark.slow
def test_the_road_through_an_object_store(
    run: Run, settings: dict[str, str], tiny_cached: Path, store_work: UPath, tmp_path: Path
) -> None:
    local = work_of(tiny_cached)
    planned = json.loads(run("plan", "--json", "-q", "-c", settings["cache"]).stdout)
    assert planned["fits"]
    assert planned["space"]["free_bytes"] is None
    run("cache-teachers", "-q", "-c", settings["cache"], "--window-batch", "8")
    taken = sum(n for name, n in sizes(store_work).items() if name.startswith(("cases", "teach")))
    assert abs(planned["to_make"]["total"]["total_bytes"] / taken - 1) < 0.25
    second = run("cache-teachers", "-q", "-c", settings["cache"])
    assert "0 done, 27 already there, 0 failed" in second.stderr
    assert json.loads(run("status", "--json").stdout)["not_done"] == []
    assert "27 units" in run("cache", "verify", "--deep", "-q").stdout
    why = json.loads(
        run("cache", "why", "liver-ct/case_000", "--json", "-c", settings["cache"]).stdout
    )
    assert {reason["verdict"] for reason in why} == {"reused"}
    again = ("--recompute", "--sample", "1", "--window-batch", "8")
    made = json.loads(run("cache", "verify", *again, "-q", "--json").stdout)
    assert max(made["recomputed"][0]["log_odds"].values()) == 0.0
    same = CliRunner().invoke(cli.app, ["cache", "diff", "--json", str(local), str(store_work)])
    assert json.loads(same.stdout)["same"], same.output

    for work in (local, store_work):
        run("train-student", "-q", "-c", settings["train"], work=work)
    assert "1 already there" in run("train-student", "-q", "-c", settings["train"]).stderr
    assert _metrics(local) == _metrics(store_work)
    images = str(tiny_cached.parent / "data" / "liver-ct" / "images")
    maps = []
    for number, work in enumerate((local, store_work)):
        output = tmp_path / str(number)
        student = f"{work}/students/student/student.pt"
        done = CliRunner().invoke(cli.app, ["predict", student, images, "-o", str(output), "-q"])
        assert done.exit_code == 0, done.output
        maps.append((output / "case_000.nii.gz").read_bytes())
    assert maps[0] == maps[1]
    listed = json.loads(run("cache", "ls", "--json").stdout)
    assert listed["teachers"][0]["students"] == ["student"]
    case = ("--case", "liver-ct/case_001", "--regions", "-o")
    run("cache", "export", *case, str(tmp_path / "exported"))
    assert len(list((tmp_path / "exported").rglob("*.nii.gz"))) == 5

    # What `aws s3 sync` brings to a disk is a cache there: a receipt names its copy by itself.
    store_work.fs.get(f"{store_work.path}/", str(tmp_path / "copied"), recursive=True)
    checked = run("cache", "verify", "--deep", "-q", work=tmp_path / "copied")
    assert "27 units" in checked.stdout
    assert "nothing wrong" in checked.stdout


@pytest.fixture
def uploaded(tiny_cached: Path, store_work: UPath) -> UPath:
    """The copy's filled work folder, copied into the store: it is a cache there."""
    store_work.fs.put(f"{work_of(tiny_cached)}/", store_work.path, recursive=True)
    return store_work


@pytest.mark.slow
def test_a_dropped_teacher_goes_with_gc_and_nothing_else(
    run: Run, settings: dict[str, str], tiny_cached: Path, store_work: UPath
) -> None:
    run("cache-teachers", "-q", "-c", settings["cache"])
    before = set(sizes(store_work))
    change_registry(tiny_cached, lambda data: data["teachers"].pop("spleen"))
    arguments = ["cache", "gc", str(tiny_cached), "-w", str(store_work), "--yes", "-q"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    spleen = ("teachers/spleen@", "index/teachers/spleen", "index/evidence/spleen")
    gone = before - set(sizes(store_work))
    assert gone == {name for name in before if name.startswith(spleen)}
    assert gone
    assert "18 units" in run("cache", "verify", "-q").stdout


@pytest.mark.slow
def test_a_student_stopped_anywhere_goes_on_bit_for_bit(
    run: Run, settings: dict[str, str], tiny_cached: Path, uploaded: UPath
) -> None:
    """Killed after a checkpoint was sent: what is lost is what came after it."""
    run("train-student", "-q", "-c", settings["train"], work=work_of(tiny_cached))

    def killed() -> NoReturn:
        raise KeyboardInterrupt

    with at_step(3, killed):
        run("train-student", "-q", "-c", settings["train"], "--checkpoint-minutes", "0", expect=130)
    checkpoints = [name for name in sizes(uploaded / "students") if "/checkpoints/" in name]
    assert [Path(name).name for name in checkpoints] == ["step_00000001.pt", "step_00000002.pt"]
    run("train-student", "-q", "-c", settings["train"])
    assert _metrics(work_of(tiny_cached)) == _metrics(uploaded)
    straight, resumed = (
        _weights(work / "students" / "student" / "student.pt")
        for work in (work_of(tiny_cached), uploaded)
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cache", "ls", "-w", "s3://no-such-bucket/work"), "no-such-bucket.*object store cannot"),
        (("status", "-w", "nowhere://work"), r"nowhere://work.*organ-distill\[s3\]"),
    ],
)
def test_a_store_that_cannot_be_used_is_named(
    arguments: tuple[str, ...], message: str, store_endpoint: str, tiny_registry: Path
) -> None:
    done = CliRunner().invoke(cli.app, [*arguments, "-r", str(tiny_registry)])
    assert isinstance(done.exception, PipelineError)
    assert done.exception.exit_code == 2
    assert re.search(message, str(done.exception))


def _metrics(work: Any) -> list[dict[str, Any]]:
    text = read_text(work / "students" / "student" / "metrics.jsonl")
    return without_timing(json.loads(line) for line in text.splitlines())


def _weights(path: Any) -> dict[str, Any]:
    with path.open("rb") as file:
        state: dict[str, Any] = torch.load(file, weights_only=True)["state"]
    assert all(np.isfinite(tensor.numpy()).all() for tensor in state.values())
    return state
