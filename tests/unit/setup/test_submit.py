"""Chains and records, with programs that play Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.errors import ConfigError, EngineError
from pipeline.log import Log
from pipeline.setup.submit import (
    Job,
    SubmitSettings,
    Target,
    in_order,
    record,
    recorded,
    scripts,
    states,
    submit,
    with_states,
)
from tests.tiny import work_of

# Counts from 41; refuses what holds a word of a file, when tried or when submitted.
SBATCH = """
text=$(cat)
case " $* " in
  *--test-only*)
    grep -qsf refused-when-tried <<< "$text" && { echo "no: tried" >&2; exit 1; }
    exit 0;;
esac
grep -qsf refused <<< "$text" && { echo "no: submitted" >&2; exit 1; }
echo "$*" >> options
number=$((40 + $(wc -l < options)))
echo "$number;cluster"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where programs of Slurm are played, which is also where they run."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    play(folder, "sbatch", SBATCH)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.chdir(folder)
    return folder


def play(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def chain(folder: Path, *stages: str, after: tuple[str, ...] = (), num_parts: int = 1) -> list[Job]:
    target = Target(folder / "data_registry.yaml", folder / "work", teachers=("liver",))
    settings = SubmitSettings().with_parts(num_parts)
    texts = scripts(in_order(stages), settings, target)
    return submit(texts, settings, target, after=after, log=Log(quiet=True))


class TestSubmission:
    def test_each_waits_for_the_one_before(self, slurm: Path, tmp_path: Path) -> None:
        jobs = chain(tmp_path, "evaluate", "cache-teachers", "train-student", after=("7", "9"))
        assert [(j.job, j.stage, j.after) for j in jobs] == [
            ("41", "cache-teachers", ("7", "9")),
            ("42", "train-student", ("41",)),
            ("43", "evaluate", ("42",)),
        ]
        assert (slurm / "options").read_text().splitlines() == [
            "--parsable --dependency=afterok:7:9 --kill-on-invalid-dep=yes",
            "--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes",
            "--parsable --dependency=afterok:42 --kill-on-invalid-dep=yes",
        ]

    def test_parts_wait_until_the_gates_job_has_ended_however_it_did(
        self, slurm: Path, tmp_path: Path
    ) -> None:
        jobs = chain(tmp_path, "train-teachers", "cache-teachers", "predict", num_parts=4)
        assert [(j.job, j.stage, j.after) for j in jobs] == [
            ("41", "train-teachers", ()),
            ("42", "cache-teachers-gate", ("41",)),
            ("43", "cache-teachers", ("42",)),
            ("44", "predict", ("43",)),
        ]
        said = (slurm / "options").read_text().splitlines()
        waits = [line.split()[1] for line in said[1:]]
        assert waits == ["--dependency=afterok:41", "--dependency=afterany:42",
                         "--dependency=afterok:43"]  # fmt: skip
        assert jobs[1].log == str(tmp_path / "work/logs/slurm/cache-teachers-gate-42.log")

    def test_records_and_scripts_are_kept_and_read_back(self, slurm: Path, tmp_path: Path) -> None:
        jobs = chain(tmp_path, "cache-teachers", "train-student")
        work = tmp_path / "work"
        assert recorded(work) == jobs
        assert "--part-id" in (work / "jobs" / "41-cache-teachers.sh").read_text()
        assert jobs[0].log == str(work / "logs/slurm/cache-teachers-41_*.log")
        assert jobs[1].log == str(work / "logs/slurm/train-student-42.log")
        assert (work / "logs/slurm").is_dir()

    def test_if_one_is_refused_nothing_is_submitted(self, slurm: Path, tmp_path: Path) -> None:
        (slurm / "refused-when-tried").write_text("job-name=train-student")
        with pytest.raises(ConfigError, match=r"train-student: Slurm refuses it \(no: tried"):
            chain(tmp_path, "cache-teachers", "train-student")
        assert not (slurm / "options").exists()
        assert not (tmp_path / "work").exists()

    def test_a_late_refusal_names_what_was_submitted(self, slurm: Path, tmp_path: Path) -> None:
        (slurm / "refused").write_text("job-name=train-student")
        with pytest.raises(EngineError, match=r"no: submitted.*cache-teachers is 41"):
            chain(tmp_path, "cache-teachers", "train-student")
        assert [job.job for job in recorded(tmp_path / "work")] == ["41"]

    def test_no_slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match="sbatch cannot be run"):
            chain(tmp_path, "predict")

    @pytest.mark.parametrize("stages", [("predict", "predict"), ("student",)])
    def test_stages_that_are_none(self, stages: tuple[str, ...]) -> None:
        with pytest.raises(ConfigError):
            in_order(stages)


class TestStates:
    def test_squeue_then_sacct_then_unknown(self, slurm: Path) -> None:
        play(slurm, "squeue", "printf '41_0|RUNNING\\n41_1|PENDING\\n41_2|PENDING\\n42|PENDING\\n'")
        play(slurm, "sacct", 'echo "$@" > asked; printf "43|CANCELLED by 0\\n"')
        assert states(["41", "42", "43", "44"]) == {
            "41": "1 RUNNING, 2 PENDING",
            "42": "PENDING",
            "43": "CANCELLED",
            "44": "unknown",
        }
        assert (slurm / "asked").read_text().endswith("--jobs=43,44\n")

    def test_what_answers_nothing_is_unknown(self, slurm: Path) -> None:
        play(slurm, "squeue", "echo '41|RUNNING'; exit 1")
        play(slurm, "sacct", "echo 'accounting is disabled' >&2; exit 1")
        assert states(["41"]) == {"41": "unknown"}

    def test_without_jobs_nobody_is_asked(self, slurm: Path) -> None:
        play(slurm, "squeue", "touch asked")
        assert with_states(slurm) == []
        assert not (slurm / "asked").exists()

    def test_a_record_that_cannot_be_read_is_passed_over(self, slurm: Path) -> None:
        job = Job("9", "predict", "2026-01-01T00:00:00", ("8",), "log")
        record(slurm, job)
        record(slurm, Job("10", "evaluate", "2026-01-01T00:00:00"))
        (slurm / "jobs" / "11-odd.json").write_text("[1]")
        (slurm / "jobs" / "12-odd.json").write_text("{")
        assert [found.job for found in recorded(slurm)] == ["9", "10"]
        assert recorded(slurm)[0] == job


class TestCommandLine:
    def test_print_shows_and_does_nothing(self, slurm: Path, built_cohort: Path) -> None:
        shown = self.run(built_cohort, "--print", "cache-teachers", "--num-parts", "5")
        assert shown.exit_code == 0, shown.output
        assert "#SBATCH --array=0-4\n" in shown.output
        assert f"--registry {built_cohort} --work {work_of(built_cohort)}" in shown.output
        assert not (slurm / "options").exists()
        assert not work_of(built_cohort).exists()

    def test_names_and_splits_come_from_the_settings_of_stages(
        self, slurm: Path, built_cohort: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "s.yaml").write_text("run: mine")
        (tmp_path / "e.yaml").write_text("splits: [validation]")
        shown = self.run(
            built_cohort, "--print", "train-teachers", "train-student", "predict", "evaluate",
            "-c", f"train-student={tmp_path / 's.yaml'}", "-c", f"evaluate={tmp_path / 'e.yaml'}",
        ).output  # fmt: skip
        assert "teachers=(liver spleen)\n" in shown
        assert "students/mine/student.pt" in shown
        assert "--split validation" in shown
        assert f"--config {tmp_path / 's.yaml'}\n" in shown
        assert shown.count("#!/bin/bash") == 4

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ((), "no stage"),
            (("predict", "-c", "predict.yaml"), "takes STAGE=FILE"),
            (("predict", "-c", "predict=a", "-c", "predict=b"), "takes STAGE=FILE"),
            (("predict", "-c", "train-student=none.yaml"), "cannot be read"),
            (("predict", "-w", "s3://bucket/x"), "a disk that the nodes share"),
        ],
    )
    def test_mistakes(
        self, arguments: tuple[str, ...], told: str, slurm: Path, built_cohort: Path
    ) -> None:
        result = self.run(built_cohort, *arguments)
        assert isinstance(result.exception, ConfigError)
        assert told in str(result.exception)

    def test_templates_are_copied(self, slurm: Path, tmp_path: Path, built_cohort: Path) -> None:
        assert self.run(built_cohort, "--copy-templates", str(tmp_path / "own")).exit_code == 0
        assert (tmp_path / "own" / "train-student.sh").exists()

    def test_status_shows_the_jobs(self, slurm: Path, tiny_registry: Path) -> None:
        assert self.run(tiny_registry, "-q", "cache-teachers", "train-student").exit_code == 0
        play(slurm, "squeue", "printf '41_0|RUNNING\\n42|PENDING\\n'")
        where = ["-r", str(tiny_registry), "-w", str(work_of(tiny_registry))]
        jobs = json.loads(CliRunner().invoke(app, ["status", *where, "--json"]).output)["jobs"]
        assert [(j["job"], j["stage"], j["state"]) for j in jobs] == [
            ("41", "cache-teachers", "RUNNING"),
            ("42", "train-student", "PENDING"),
        ]
        assert "train-student" in CliRunner().invoke(app, ["status", *where]).output

    @staticmethod
    def run(registry: Path, *arguments: str):  # type: ignore[no-untyped-def]
        where = [] if "-w" in arguments else ["-w", str(work_of(registry))]
        return CliRunner().invoke(app, ["submit", "-r", str(registry), *where, *arguments])
