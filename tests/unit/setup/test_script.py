from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.setup.submit import (
    GATE_JOB,
    STAGES,
    TEMPLATES,
    JobSettings,
    SubmitSettings,
    Target,
    copy_templates,
    fill,
    script,
    scripts,
)

ORDINARY = JobSettings()
ALL = (*STAGES, GATE_JOB)


def target(folder: Path, **changes: object) -> Target:
    values = {"teachers": ("liver", "spleen"), **changes}
    return Target(folder / "data_registry.yaml", folder / "work", **values)  # type: ignore[arg-type]


class TestSettings:
    def test_a_stage_changes_what_is_said_for_all(self, tmp_path: Path) -> None:
        path = tmp_path / "slurm.yaml"
        path.write_text(
            "{partition: gpu, gres: 'gpu:1', stages: {evaluate: {gres: null, cores: 2}, "
            "train-student: {nodes: 2, tasks_per_node: 4}}}"
        )
        settings = load_config(path, SubmitSettings)
        evaluate, student = settings.of("evaluate"), settings.of("train-student")
        assert (evaluate.partition, evaluate.gres, evaluate.cores) == ("gpu", None, 2)
        assert (student.gres, student.nodes, student.tasks_per_node) == ("gpu:1", 2, 4)
        assert settings.of("predict").gres == "gpu:1"

    def test_parts_of_the_command_line_leave_the_rest_as_the_file_has_it(self) -> None:
        settings = SubmitSettings.model_validate(
            {"cores": 3, "stages": {"cache-teachers": {"num_parts": 4, "gres": "gpu:1"}}}
        ).with_parts(16)
        found = settings.of("cache-teachers")
        assert (found.num_parts, found.gres, found.cores) == (16, "gpu:1", 3)

    @pytest.mark.parametrize("name", ["nodes", "tasks_per_node", "num_parts"])
    def test_several_where_there_is_one(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"predict has no use for `{name}: 2`"):
            SubmitSettings.model_validate({name: 2}).of("predict")

    def test_copies_on_the_node_are_the_students_alone(self) -> None:
        with pytest.raises(ConfigError, match=r"predict has no use for `stage_to: \$TMPDIR`"):
            SubmitSettings.model_validate({"stage_to": "$TMPDIR"}).of("predict")

    @pytest.mark.parametrize("text", ['a"; rm b', "`c`", "d\\", "e\nf", ""])
    def test_a_folder_for_copies_that_would_end_its_quotes(self, text: str) -> None:
        with pytest.raises(ValueError, match="stage_to"):
            JobSettings(stage_to=text)

    def test_unknown_stages_and_fields_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "slurm.yaml"
        path.write_text("stages:\n  student: {}\nwalltimes: 3\n")
        with pytest.raises(ConfigError, match="2 mistakes"):
            load_config(path, SubmitSettings)


class TestScripts:
    @pytest.mark.parametrize("stage", ALL)
    def test_it_is_shell_and_leaves_no_place_empty(self, stage: str, tmp_path: Path) -> None:
        text = script(stage, ORDINARY, target(tmp_path / "it's here"))
        checked = subprocess.run(["bash", "-n"], input=text, text=True, check=False)
        assert checked.returncode == 0
        assert "{{" not in text
        assert "#SBATCH --requeue --open-mode=append" in text
        lines = text.splitlines()
        code = next(n for n, line in enumerate(lines) if n and line and line[0] != "#")
        assert not any(line.startswith("#SBATCH") for line in lines[code:])  # sbatch stops there

    def test_what_a_job_asks_for(self, tmp_path: Path) -> None:
        settings = JobSettings(
            partition="gpu", account="us", walltime="01:00:00", cores=3, memory="32 GiB",
            gres="gpu:4", directives=("--qos=long",), prologue=("module load cuda",),
            nodes=2, tasks_per_node=4, signal_seconds=90, num_restarts=7,
            arguments=("--workers", "3"),
        )  # fmt: skip
        text = script("train-student", settings, target(tmp_path))
        asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
        assert asked[2:] == [
            "--partition=gpu", "--account=us", "--time=01:00:00", "--nodes=2",
            "--ntasks-per-node=4", "--cpus-per-task=3", "--mem=32G", "--gres=gpu:4", "--qos=long",
        ]  # fmt: skip
        assert "--signal=USR1@90" in asked[1]
        assert "\nmodule load cuda\n" in text
        assert '[ "${SLURM_RESTART_COUNT:-0}" -lt 7 ]' in text
        assert "--workers 3\ncode=$?" in text

    def test_the_jobs_shell_puts_in_the_folder_for_copies(self, tmp_path: Path) -> None:
        text = script("train-student", JobSettings(stage_to="$NODE/a b"), target(tmp_path))
        (line,) = (line for line in text.splitlines() if "--stage-to" in line)
        told = subprocess.run(
            ["bash", "-c", f'NODE=/scratch; printf "%s\n" {line}'],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert told.stdout.splitlines()[-2:] == ["--stage-to", "/scratch/a b"]
        assert "--stage-to" not in script("train-student", ORDINARY, target(tmp_path))

    def test_stage_one_is_an_array_of_parts(self, tmp_path: Path) -> None:
        text = script("cache-teachers", JobSettings(num_parts=16), target(tmp_path))
        assert "#SBATCH --array=0-15\n" in text
        assert '--num-parts 16 --part-id "$SLURM_ARRAY_TASK_ID"\n' in text
        assert "cache-teachers-%A_%a.log" in text

    def test_parts_have_a_job_before_them_that_goes_as_far_as_the_gate(
        self, tmp_path: Path
    ) -> None:
        there = target(tmp_path)
        several = SubmitSettings(gres="gpu:1").with_parts(4)
        texts = scripts(["cache-teachers", "predict"], several, there)
        assert list(texts) == [GATE_JOB, "cache-teachers", "predict"]
        gate = texts[GATE_JOB]
        assert " --gate-only\ncode=$?" in gate
        assert "--num-parts" not in gate
        assert "--array" not in gate
        assert "#SBATCH --gres=gpu:1\n" in gate
        assert f"{GATE_JOB}-%j.log" in gate
        assert list(scripts(["cache-teachers"], SubmitSettings(), there)) == ["cache-teachers"]

    def test_a_student_that_is_not_called_so_is_predicted_and_judged(self, tmp_path: Path) -> None:
        configs = {"predict": tmp_path / "predict.yaml"}
        named = target(tmp_path, run="a/b", splits=("test", "validation"), configs=configs)
        predicted = named.work / "predictions" / "a" / "b"
        words = named.words("predict", ORDINARY)
        assert str(named.work / "students" / "a" / "b" / "student.pt") in words
        assert words[-6:] == ["--split", "test", "--split", "validation", "--config",
                              str(configs["predict"])]  # fmt: skip
        assert str(predicted) == words[words.index("--output") + 1]
        assert named.words("evaluate", ORDINARY)[4] == str(predicted)

    def test_folds_are_an_array_and_judged_together(self, tmp_path: Path) -> None:
        folder = tmp_path / "it's here"
        texts = [
            script(stage, ORDINARY, target(folder, run="mine", folds=3))
            for stage in ("train-student", "predict", "evaluate")
        ]
        assert [t.count("#SBATCH --array=0-2\n") for t in texts] == [1, 1, 0]
        (run,) = (line for line in texts[0].splitlines() if line.startswith("run="))
        lines = [next(x for x in t.splitlines() if "pipeline.cli" in x) for t in texts]

        def heard(line: str) -> list[str]:
            shell = f'SLURM_ARRAY_TASK_ID=2; printf "%s\n" {line}'
            done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
            return done.stdout.splitlines()

        student = str(folder / "work" / "students" / "mine-fold2")
        assert heard(run.removeprefix("run=")) == [student]
        trains, predicts, judges = map(heard, lines)
        assert trains[-2:] == ["--fold", "2"]
        assert f"{student}/student.pt" in predicts
        assert predicts[-2:] == ["--fold", "2"]
        assert "--split" not in predicts
        assert judges[-1] == "--folds"
        assert str(folder / "work" / "predictions" / "mine") in predicts
        assert str(folder / "work" / "predictions" / "mine") in judges

    def test_no_teacher_to_train(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no teacher to train"):
            script("train-teachers", ORDINARY, target(tmp_path, teachers=()))


class TestTemplates:
    def test_a_changed_one_is_used_and_the_others_are_built_in(self, tmp_path: Path) -> None:
        own = tmp_path / "own"
        copy_templates(own)
        assert sorted(p.name for p in own.iterdir()) == sorted(f"{s}.sh" for s in ALL)
        changed = own / "predict.sh"
        changed.write_text(changed.read_text() + "# ours: {{name}} $HOME\n")
        (own / "evaluate.sh").unlink()
        there = target(tmp_path)
        assert script("predict", ORDINARY, there, own).endswith("# ours: predict $HOME\n")
        assert script("evaluate", ORDINARY, there, own) == script("evaluate", ORDINARY, there)

    def test_changed_ones_are_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "predict.sh").write_text("ours")
        with pytest.raises(ConfigError, match=r"it holds predict\.sh already"):
            copy_templates(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["predict.sh"]

    def test_an_unknown_place_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"\{\{walltime\}\}.*There are name"):
            fill("{{name}} {{walltime}}", {"name": "x"})

    def test_shell_that_looks_like_a_place_stays(self) -> None:
        text = "${#parts[@]} {% x %} {# y #} }} ${X:-{{ name }}}\n\n"
        assert fill(text, {"name": "x"}) == "${#parts[@]} {% x %} {# y #} }} ${X:-x}\n\n"

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("a\nb {{name", r"line 2 \(unexpected end of template"),
            ("awk '{{print $1}}'", r"line 1 \(unexpected char"),
            ("{{name()}}", "'str' object is not callable"),
            ("{{range}}", r"nothing is known of \{\{range\}\}"),
        ],
    )
    def test_braces_that_are_no_place_are_refused(self, text: str, told: str) -> None:
        with pytest.raises(ConfigError, match=f"a template of `pipeline submit`: .*{told}.*name"):
            fill(text, {"name": "x"})

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such folder of templates"):
            script("predict", ORDINARY, target(tmp_path), tmp_path / "none")

    def test_one_for_each_job(self) -> None:
        assert sorted(p.stem for p in TEMPLATES.iterdir()) == sorted(ALL)


class TestWhatAStartLeadsTo:
    """The scripts run as they are, with an `srun` and a `scontrol` that do as told."""

    STUDENT = 'mkdir -p "$RUN/checkpoints"; '
    SAVES = STUDENT + 'sleep 0.05; touch "$RUN/checkpoints/step_00000003.pt"; '
    FINISHES = STUDENT + 'sleep 0.05; touch "$RUN/finished.json"; '

    @pytest.mark.parametrize(
        ("stage", "does", "restarts", "code", "requeued"),
        [
            ("train-student", "exit 0", 0, 0, ""),
            ("train-student", SAVES + "exit 1", 0, 1, "requeue 7"),
            ("train-student", SAVES + "exit 143", 2, 143, "requeue 7"),
            ("train-student", SAVES + "exit 1", 3, 1, ""),  # often enough
            ("train-student", SAVES + "exit 2", 0, 2, ""),  # for people to mend
            ("train-student", "exit 1", 0, 1, ""),  # came no further
            ("train-student", FINISHES + "exit 143", 0, 0, ""),  # exit codes lie
            ("train-teachers", SAVES + "exit 1", 0, 1, "requeue 5_1"),
            ("train-teachers", "exit 1", 0, 1, ""),
            ("cache-teachers", "exit 138", 0, 138, "requeue 5_1"),
            ("cache-teachers", "exit 138", 3, 138, ""),
            ("cache-teachers", "exit 1", 0, 1, ""),
            (GATE_JOB, "exit 138", 0, 138, "requeue 7"),
            (GATE_JOB, "exit 138", 3, 138, ""),
            (GATE_JOB, "exit 2", 0, 2, ""),
            ("predict", "exit 137", 0, 137, "requeue 7"),
        ],
    )
    def test_it(
        self, stage: str, does: str, restarts: int, code: int, requeued: str, tmp_path: Path
    ) -> None:
        named = target(tmp_path / "a b")
        run = named.work / "students" / "student"
        if stage == "train-teachers":
            run = named.work / "teachers-in-training" / "spleen"
        older = run / "checkpoints" / "step_00000001.pt"  # of an earlier start
        older.parent.mkdir(parents=True)
        older.touch()
        os.utime(older, (1, 1))
        (run / "finished.json").touch()
        os.utime(run / "finished.json", (1, 1))
        named.jobs.mkdir()
        programs = tmp_path / "programs"
        programs.mkdir()
        for name, text in {
            "srun": f'echo "$@" > {tmp_path}/srun.txt; {does}',
            "scontrol": f'[ "$1" = show ] && echo n0 || echo "$@" >> {tmp_path}/asked.txt',
        }.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        text = script(stage, JobSettings(num_restarts=3), named)
        ended = subprocess.run(
            ["bash"],
            input=text,
            text=True,
            check=False,
            env={
                "PATH": f"{programs}:{os.environ['PATH']}", "RUN": str(run), "SLURM_JOB_ID": "7",
                "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_PER_TASK": "1",
                "SLURM_RESTART_COUNT": str(restarts),
            },
        )  # fmt: skip
        assert ended.returncode == code
        asked = tmp_path / "asked.txt"
        assert (asked.read_text().strip() if asked.exists() else "") == requeued
        assert list(named.jobs.iterdir()) == []
        if stage == "train-teachers":
            assert (tmp_path / "srun.txt").read_text().endswith("--only spleen\n")


def test_the_command_survives_the_shell(tmp_path: Path) -> None:
    named = target(tmp_path / "it's $here")
    text = script("evaluate", ORDINARY, named)
    command = text.rsplit("exec ", 1)[1]
    assert shlex.split(command) == named.words("evaluate", ORDINARY)
