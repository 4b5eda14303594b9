"""Errors that no test of a feature raises, each raised on the shortest way and read.

What all tests hold of an error (whole sentences, no jargon) is asked by `every_error_reads_well`;
here it is what the error says of its own cause.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from pipeline.cli import demo
from pipeline.cli.options import parse_size
from pipeline.cli.review import _numbers
from pipeline.cli.setup import _files, _target
from pipeline.config import Config, load_config
from pipeline.data.nifti import write_like
from pipeline.data.registry import load_registry
from pipeline.data.sizes import two_cases
from pipeline.data.volume import Grid, Volume
from pipeline.engine import choose, parts
from pipeline.engine.parts import SlurmSettings
from pipeline.errors import ConfigError, PipelineError, TeacherError
from pipeline.folder import parse_folder
from pipeline.log import Log
from pipeline.networks.by_name import NetworkConfig, build_network, find_module, pick_device
from pipeline.review import metrics
from pipeline.review.gc import find_garbage
from pipeline.review.inspect import run as inspection
from pipeline.setup import submit
from pipeline.setup.submit import SubmitSettings
from pipeline.student import distributed, speed
from pipeline.student.checkpoint import _checked
from pipeline.student.distributed import Processes, _portable
from pipeline.student.loggers import open_loggers
from stages.compare import budget, scoring
from stages.compare.plan import ComparisonSettings, check_configurations, check_settings
from stages.report import StageReport
from stages.train_student import TrainStudentConfig
from tests.tiny import NETWORK, RunCli, change_registry

LOG = Log(quiet=True)
CASE = np.zeros((2, 3, 4), dtype=np.uint8)


class OneNumber(Config):
    """Settings for mistakes."""

    number: int = 0


def settings(**changes: Any) -> ComparisonSettings:
    return replace(ComparisonSettings("named"), **changes)


def engine(executor: str | None = None, **changes: Any) -> None:
    options: dict[str, Any] = {"workers": None, "slurm_config": None, "device": "auto"}
    with choose.open_engine(executor, work=Path("work"), log=LOG, **{**options, **changes}):
        pass


def part(number: int | None, of: int | None, gate: bool = False, **environment: str) -> object:
    told = {f"SLURM_ARRAY_TASK_{k}": v for k, v in environment.items()}
    return parts.chosen_part(of, number, told, gate_only=gate)


def score(prediction: Any, reference: Any, spacing_mm: Any = (1, 1, 1)) -> object:
    grid = Grid.axis_aligned((*reference.shape, 1, 1, 1)[:3], spacing_mm)
    return metrics.score_case(prediction, reference, {"liver": 1}, grid)


def student(run: str) -> TrainStudentConfig:
    return TrainStudentConfig.model_validate({"run": run})


FLAGS: dict[str, Callable[[], object]] = {
    "--seeds: 'one' are no whole numbers. Write them as 0,1,2.": lambda: _numbers("one"),
    "--config takes STAGE=FILE, once for each stage.": lambda: _files(["student.yaml"]),
    "'a b' cannot name a comparison": lambda: check_settings(settings(name="a b")),
    "seeds must be at least one": lambda: check_settings(settings(seeds=())),
    "a seed is negative": lambda: check_settings(settings(seeds=(1, -1))),
    "are two budgets": lambda: check_settings(settings(steps=1, seconds=1)),
    "at least one step": lambda: check_settings(settings(steps=0)),
    "--seconds: must be more than 0": lambda: check_settings(settings(seconds=0)),
    "no configuration to compare is named": lambda: check_configurations([], "a"),
    "there is no configuration 'b' to compare with": lambda: check_configurations(
        [student("a")], "b"
    ),
    "'a/b' is a run of another comparison": lambda: check_configurations([student("a/b")], "a/b"),
    "--workers without --executor.": lambda: engine(workers=2),
    "--slurm-config without --executor slurm.": lambda: engine(slurm_config=Path("s.yaml")),
    "does not start workers there": lambda: engine("tcp://host:1", workers=2),
    "--device cuda:1 with --executor": lambda: engine("local", device="cuda:1"),
    "--executor tcp:/host: no such executor.": lambda: engine("tcp:/host"),
    "--part-id without --num-parts.": lambda: part(1, None),
    "--part-id 4: parts of 4 are 0 to 3.": lambda: part(4, 4),
    "--num-parts without --part-id": lambda: part(None, 4),
    "--gate-only with --num-parts or --part-id": lambda: part(None, 4, gate=True),
    "this Slurm array has 3 elements": lambda: part(None, 4, ID="1", COUNT="3"),
    "element 9 of this Slurm array": lambda: part(None, 4, ID="9", COUNT="4", MIN="1"),
    "this kind of folder cannot be used": lambda: parse_folder("nosuchstore://a/b"),
    "'abacus' is no device": lambda: pick_device("abacus"),
    "'lots' is no size": lambda: parse_size("lots", "--quota"),
    "there is no logger 'paper'": lambda: open_loggers(["paper"]),
    "no job can be made of 'demo'": lambda: submit.in_order(["demo"]),
    "predict is there twice": lambda: submit.in_order(["predict", "predict"]),
    "nothing is known of {{x}}, {{y}}": lambda: submit.fill("{{y}} {{x}} {{z}}", {"z": ""}),
    "no such folder of templates": lambda: submit._template("predict", Path("/nowhere")),
    "predict has no use for `nodes: 2`": lambda: SubmitSettings(nodes=2).of("predict"),
    "no registry is named": lambda: find_garbage(Path("work"), [], grace_hours=0),
    "no case whose header can be read": lambda: two_cases([]),
    "a batch of 3 cannot be shared equally": lambda: Processes(0, 2).share(3),
}

THINGS: dict[str, Callable[[], object]] = {
    "three positive numbers of mm, not [1.0, 0.0, 1.0]": lambda: score(CASE, CASE, (1, 0, 1)),
    "the prediction has shape (2, 3), the reference (2, 3, 4)": lambda: score(CASE[..., 0], CASE),
    "three axes, not shape (2, 3)": lambda: score(CASE[..., 0], CASE[..., 0]),
    "the prediction must hold whole numbers, not float32": lambda: score(
        CASE.astype(np.float32), CASE
    ),
    "UNet: the network has no layer 'nose' to tap": lambda: find_module(
        build_network(NETWORK, in_channels=1, out_channels=2), "nose"
    ),
    "network.name: monai.networks.nets has no network 'Sieve'": lambda: build_network(
        NetworkConfig(name="Sieve"), in_channels=1, out_channels=2
    ),
    "it is no checkpoint in format": lambda: _checked({"format_version": -1}, Path("step_1.pt")),
    "what the launcher says of this process cannot be": lambda: distributed.launched(
        {"WORLD_SIZE": "2", "RANK": "2"}
    ),
    "MASTER_ADDR: it is not set": lambda: distributed._meeting_point({}),
}


EACH = {**FLAGS, **THINGS}


# The text alone names a test: an address in memory would differ between processes.
@pytest.mark.parametrize(("says", "raises"), EACH.items(), ids=list(EACH))
def test_it_is_raised_and_says_so(says: str, raises: Callable[[], object]) -> None:
    with pytest.raises(PipelineError) as caught:
        raises()
    assert says in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("number: [", ":1: not valid YAML: "),
        ("number: &a [*a]\n", "a value contains itself (&, *). Write the values out instead."),
        ("number: many\n", ":1: number: "),
        ("number: 1\nnumber: 2\nother: 3\n", "2 mistakes:\n"),
        (None, "cannot be read ("),
    ],
)
def test_a_file_of_settings(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "s.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, OneNumber)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["submit"], "error: pipeline submit: no stage is named."),
        (["cache", "verify", "--recompute"], "error: --recompute and --sample N go together."),
        (["cache", "ls", "-w", "nowhere"], "error: nowhere: there is no such folder."),
        (
            ["train-student", "--steps", "5"],
            "--steps and --seed are of the self-test alone.",
        ),
        (
            ["predict", "student.pt", "-o", "out"],
            "predict: it takes images, or a registry",
        ),
        (
            ["predict", "student.pt", "images", "-o", "out"],
            "error: images: no NIfTI file and no DICOM series there.",
        ),
    ],
)
def test_of_the_command_line(
    tmp_path: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: RunCli,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(*arguments)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1  # one paragraph
    assert list(tmp_path.iterdir()) == []


class TestOfARegistry:
    def test_nothing_to_generate(self, tiny_registry: Path) -> None:
        registry = load_registry(tiny_registry)
        with pytest.raises(ConfigError, match="no dataset in this registry has a `phantom` entry"):
            demo.generate_phantoms(registry, LOG)

    def test_no_teachers(self, tiny_registry: Path) -> None:
        change_registry(tiny_registry, lambda data: data.pop("teachers"))
        registry = load_registry(tiny_registry)
        with pytest.raises(ConfigError, match="no teachers, so there are no regions to look at"):
            inspection._check_teachers(registry)

    def test_jobs_need_a_disk(self) -> None:
        store: Any = SimpleNamespace()  # anything that is no local path
        with pytest.raises(ConfigError, match="jobs of Slurm need a work folder on a disk"):
            _target(Path("data_registry.yaml"), store, [])


class TestOfThisMachine:
    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="--device cuda:1: torch sees no CUDA GPU"):
            pick_device("cuda:1")

    @pytest.mark.parametrize(("device", "lacks"), [("cpu", "a C.. compiler"), ("cuda", "triton")])
    def test_nothing_to_compile_with(
        self, monkeypatch: pytest.MonkeyPatch, device: str, lacks: str
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr("shutil.which", lambda name: None)
        with pytest.raises(ConfigError, match=f"--compile: torch.compile needs {lacks}"):
            speed._check_compiler(torch.device(device))

    def test_no_slurm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(ConfigError, match="sbatch cannot be run"):
            choose._ask_slurm("#!/bin/sh\n")

    def test_slurm_that_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sbatch = tmp_path / "sbatch"
        sbatch.write_text("#!/bin/sh\necho no such partition >&2\nexit 1\n")
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        with pytest.raises(ConfigError, match=r"refuses the workers' jobs \(no such partition\)\."):
            choose._ask_slurm("#!/bin/sh\n")
        with pytest.raises(ConfigError, match=r"refuses it \(no such partition\)\."):
            submit.submit(
                {"predict": "#!/bin/sh\n"}, SubmitSettings(), submit.Target(tmp_path, tmp_path),
                log=LOG,
            )  # fmt: skip

    def test_packages_that_are_not_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
        with (
            pytest.raises(ConfigError, match="--executor slurm needs dask-jobqueue"),
            choose._slurm(1, SlurmSettings(), tmp_path),
        ):
            pass
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ConfigError, match="logger wandb needs a package"):
            open_loggers(["wandb"])


class TestOfFiles:
    def test_templates_that_are_there(self, tmp_path: Path) -> None:
        submit.copy_templates(tmp_path)
        with pytest.raises(ConfigError, match=r"it holds .*predict\.sh"):
            submit.copy_templates(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(PipelineError, match="it cannot be written"):
            submit.copy_templates(tmp_path / "file" / "below")
        (tmp_path / "predict.sh").write_bytes(b"\xff")
        with pytest.raises(PipelineError, match="the template cannot be read"):
            submit._template("predict", tmp_path)

    def test_a_label_map_of_another_shape(self, tmp_path: Path) -> None:
        like = tmp_path / "ct.nii"
        nib.save(nib.Nifti1Image(np.zeros((4, 3, 2), dtype=np.int16), np.eye(4)), like)
        volume = Volume(np.zeros((3, 3, 3), dtype=np.uint8), Grid.from_matrix([3, 3, 3], np.eye(4)))
        with pytest.raises(PipelineError, match="cannot be written like one of"):
            write_like(tmp_path / "out.nii.gz", volume, like)

    def test_records_of_a_comparison(self, tmp_path: Path) -> None:
        record = tmp_path / "budget.json"
        record.write_text("{")
        with pytest.raises(ConfigError, match=r"cannot be read .* Remove it to measure anew"):
            budget._read(record)
        record.write_text('{"seconds": 5}')
        with pytest.raises(ConfigError, match="begun with 5 seconds, not 7"):
            budget.steps_for_seconds([], {}, 7, record, speed.TrainingExecution("cpu"), LOG)
        with pytest.raises(PipelineError, match=r"the run is not finished\. Run"):
            scoring._key(tmp_path, [], scoring.ScoringSettings(split="test", surface=False))


def test_what_nobody_foresaw_in_a_demo() -> None:
    report = StageReport("predict", failed={"a/1": ValueError("odd")})
    with pytest.raises(PipelineError, match=r"a/1: predict failed \(odd\)\."):
        demo._done(report, LOG)
    known = TeacherError("bad.", where="teacher a", fix="Mend it.")
    with pytest.raises(TeacherError, match="bad"):
        demo._done(StageReport("predict", failed={"a/1": known}), LOG)


def test_what_nobody_foresaw_in_another_process() -> None:
    told = _portable(ValueError("odd"))
    assert str(told) == "another process: it failed (ValueError: odd). Its own output says where."
    assert _portable(None) is None
