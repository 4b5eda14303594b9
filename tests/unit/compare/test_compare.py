from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typer.testing import CliRunner

from pipeline.cli import app as cli
from pipeline.data.registry import load_registry
from pipeline.errors import CacheMissing, CheckpointError, ConfigError, PipelineError, Stopped
from pipeline.log import Log
from pipeline.review import statistics
from pipeline.review.units import run_folders
from pipeline.student.checkpoint import load_student
from pipeline.student.inference import StudentWindows
from pipeline.student.speed import SpeedFlags, TrainingExecution
from stages.compare import budget, scoring
from stages.compare import results as tables
from stages.compare.page import to_html, write_results
from stages.compare.plan import Comparison, ComparisonSettings, load_configurations, plan_comparison
from stages.compare.results import Results, print_results
from stages.compare.run import compare
from stages.compare.scoring import RunResult
from stages.report import Scope
from stages.train_student import TrainStudentConfig
from tests.stages.stage_contract import snapshot
from tests.tiny import (
    ORGANS,
    at_step,
    cache_config,
    change_registry,
    copy_cohort,
    fill_cache,
    in_two_folds,
    run_cache,
    training_settings,
    work_of,
)

STEPS = 2


def config(name: str, kind: str = "marginal", **changes: Any) -> TrainStudentConfig:
    values = {"steps": STEPS, "supervision": {"kind": kind}} | changes
    return TrainStudentConfig.model_validate({"run": name, "training": training_settings(**values)})


def two() -> list[TrainStudentConfig]:
    return [config("labels"), config("hard", "pseudo_label")]


def settings(**changes: Any) -> ComparisonSettings:
    return ComparisonSettings(**({"name": "both", "seeds": (0, 1)} | changes))


def scope(registry: Path) -> Scope:
    return Scope(load_registry(registry, files=False), work_of(registry), Log(quiet=True))


def plan(
    registry: Path,
    configs: Sequence[TrainStudentConfig] | None = None,
    measure: bool = True,
    **changes: Any,
) -> Comparison:
    return plan_comparison(
        two() if configs is None else configs, settings(**changes), scope(registry),
        TrainingExecution("cpu") if measure else None,
    )  # fmt: skip


def run(
    registry: Path, configs: Sequence[TrainStudentConfig] | None = None, **changes: Any
) -> Results:
    planned = plan(registry, configs, **changes)
    return compare(planned, scope(registry), TrainingExecution("cpu"), window_batch=8)


def broken() -> None:
    raise FloatingPointError("the loss became NaN in dice.")


def students(registry: Path) -> Path:
    return work_of(registry) / "students" / "both"


def weights(registry: Path, run: str) -> dict[str, torch.Tensor]:
    return dict(load_student(students(registry) / run / "student.pt")[1].state_dict())


@pytest.fixture(scope="module")
def compared(
    built_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Results, Path]:
    """A finished comparison: its registry, its results, its tables. Not to be changed."""
    folder = tmp_path_factory.mktemp("compared")
    registry = copy_cohort(built_cache, folder / "cohort")
    results = run(registry)
    write_results(results, folder / "out")
    return registry, results, folder / "out"


@pytest.fixture
def finished(compared: tuple[Path, Results, Path], tmp_path: Path) -> Path:
    """The registry of a copy of it."""
    return copy_cohort(compared[0], tmp_path / "finished")


class TestFolds:
    def test_each_case_is_scored_once_a_seed_by_the_student_that_did_not_see_it(
        self, tiny_cached: Path, tmp_path: Path
    ) -> None:
        fill_cache(in_two_folds(tiny_cached))
        results = run(tiny_cached, seeds=(0,), surface=False)
        names = {f"both/{c}-seed0-fold{k}" for c in ("labels", "hard") for k in (0, 1)}
        assert set(run_folders(work_of(tiny_cached))) == names
        for one in results.runs:
            record, _ = load_student(one.folder / "student.pt")
            scored = {row["case"] for row in one.rows}
            assert scored == {case.name for case in results.plan.scored[one.fold]}
            assert not scored & set(record.trained_on)
        assert len(results.plan.cases) == 8
        rows = [row for one in results.of("hard") for row in one.rows]
        livers = [
            [r["Dice"] for r in one.rows if r["organ"] == "liver"] for one in results.of("hard")
        ]
        found = results.estimates("hard", "Dice")["liver"]
        assert found.mean == pytest.approx(np.mean(np.concatenate(livers)))
        assert found.std == pytest.approx(np.std([np.mean(own) for own in livers], ddof=1))
        assert results.differences("hard", "Dice")["liver"].num_cases == sum(map(len, livers))
        assert any("trained on the cases of all folds but fold 0" in n for n in results.notices)
        write_results(results, tmp_path)
        assert "8 validation cases, mean ± std over 2 folds, 1 seed" in to_html(results)
        table = list(csv.DictReader((tmp_path / "validation_scores.csv").open()))
        assert [row["fold"] for row in table if row["config"] == "hard"].count("1") == sum(
            row["case"] in {c.name for c in results.plan.scored[1]} for row in rows
        )
        again = plan(tiny_cached, seeds=(0,), surface=False)
        assert all(one.finished for one in again.runs)
        # Of a seed without one of its folds no number is left.
        lost = dataclasses.replace(results.runs[0], rows=(), error="lost")
        some = dataclasses.replace(results, runs=[lost, *results.runs[1:]])
        assert np.isnan(some.scores(lost.config, "Dice")).all()

    def test_test_cases_are_not_theirs(self, tiny_cached: Path) -> None:
        fill_cache(in_two_folds(tiny_cached))
        with pytest.raises(ConfigError, match=r"not on test cases\. Average them"):
            plan(tiny_cached, test=True)


class TestResults:
    def test_every_configuration_is_trained_with_every_seed(
        self, compared: tuple[Path, Results, Path]
    ) -> None:
        registry, results, _ = compared
        names = {f"both/{c}-seed{s}" for c in ("labels", "hard") for s in (0, 1)}
        assert set(run_folders(work_of(registry))) == names
        record, _ = load_student(students(registry) / "hard-seed1" / "student.pt")
        assert (record.seed, record.steps) == (1, STEPS)
        assert record.supervision["kind"] == "pseudo_label"
        assert not results.failed

    def test_a_score_is_the_dice_of_a_whole_case(
        self, compared: tuple[Path, Results, Path]
    ) -> None:
        registry, results, _ = compared
        record, network = load_student(students(registry) / "hard-seed0" / "student.pt")
        rows = next(r.rows for r in results.runs if (r.config, r.seed) == ("hard", 0))
        seen = set()
        for case in results.plan.cases:
            logits = StudentWindows(network, record.intensity, record.patch).logits(case.image())
            ours, theirs = logits.argmax(axis=0), case.label()
            for number, organ in enumerate(ORGANS, start=1):
                found = [r["Dice"] for r in rows if (r["case"], r["organ"]) == (case.name, organ)]
                if organ not in case.annotated:
                    assert found == []
                    continue
                a, b = (ours == number) & (theirs != 255), theirs == number
                assert found == [pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))]
                seen.add((case.name, organ))
        assert len(seen) == 4  # two cases of one organ, one of both

    def test_the_tables_can_be_made_again_from_the_rows(
        self, compared: tuple[Path, Results, Path]
    ) -> None:
        _, _, out = compared
        content = json.loads((out / "validation.json").read_text())
        rows = list(csv.DictReader((out / "validation_scores.csv").open()))
        assert len(rows) == 4 * 4
        for entry in content["configurations"]:
            for organ in ORGANS:
                means = [
                    np.mean(
                        [
                            float(r["Dice"])
                            for r in rows
                            if (r["config"], r["seed"], r["organ"])
                            == (entry["name"], str(seed), organ)
                        ]
                    )
                    for seed in (0, 1)
                ]
                found = entry["scores"]["Dice"][organ]
                assert found["mean"] == pytest.approx(np.mean(means))
                assert found["std"] == pytest.approx(np.std(means, ddof=1))
        table = list(csv.DictReader((out / "validation_table.csv").open()))
        assert len(table) == 2 * 2 * (len(ORGANS) + 1)
        hard = next(r for r in table if (r["config"], r["metric"]) == ("hard", "NSD"))
        assert float(hard["difference"]) == pytest.approx(
            content["configurations"][1]["difference_to_baseline"]["NSD"]["liver"]["mean"]
        )

    def test_what_is_predicted_where_nothing_is_counts_in_scores_alone(
        self, compared: tuple[Path, Results, Path]
    ) -> None:
        """Dice 0, as nnU-Net has it; but a difference needs a pair, whatever a student predicts."""
        _, results, _ = compared
        place = {"case": "multi-ct/case_000", "organ": "spleen"}

        def without(result: RunResult, num_predicted: int) -> RunResult:
            lacks = {"n_ref": 0, "n_pred": num_predicted, "NSD": None, "HD95_mm": None}
            lacks["Dice"] = 0.0 if num_predicted else None
            rows = [r | lacks if r.items() >= place.items() else r for r in result.rows]
            assert rows != list(result.rows)
            return dataclasses.replace(result, rows=rows)

        # One seed of each configuration invents a spleen, the other none.
        runs = [without(r, 7 if r.seed == 1 else 0) for r in results.runs]
        changed = dataclasses.replace(results, runs=runs)
        k = ORGANS.index("spleen")
        before, after = results.scores("hard", "Dice"), changed.scores("hard", "Dice")
        n = [case.name for case in results.plan.cases].index(place["case"])
        assert np.isnan(after[0, n, k])
        assert after[1, n, k] == 0 < before[1, n, k]
        assert changed.estimates("hard", "Dice")["spleen"].per_seed[1] == pytest.approx(
            np.nansum(after[1, :, k]) / 2
        )
        others = [m for m in range(len(results.plan.cases)) if m != n]
        apart = before[:, others, k] - results.scores("labels", "Dice")[:, others, k]
        found = changed.differences("hard", "Dice")["spleen"]
        assert found.mean == pytest.approx(np.nanmean(apart))
        assert found.num_cases == 1
        said = "; hard, multi-ct/case_000 (spleen)."
        assert said in to_html(changed)
        assert said not in to_html(results)

    def test_the_page_says_what_differs_and_what_it_does_not_show(
        self, compared: tuple[Path, Results, Path]
    ) -> None:
        _, _, out = compared
        page = (out / "validation.html").read_text()
        columns = re.findall(r"<th scope=\"col\".*?>(.*?)</th>", page)[:6]
        assert columns == ["configuration", "kind", "steps", "parameters", "s/step", "runs"]
        assert page.count("<article") == 2  # the worst case and the median one
        titles = re.findall(r"<figcaption>(\w+)", page)
        assert titles == ["CT", "reference", "labels", "hard"] * 2
        assert not re.search(r"(src|href)=\"(?!data:)", page)
        lead = re.findall(r"class=\"lead\">(.*?)</p>", page)
        assert re.fullmatch(
            r"Highest mean Dice: (labels|hard), 0\.\d+ ± 0\.\d+ \(3 validation cases, 2 seeds\)\.",
            lead[0],
        )
        assert re.fullmatch(r"hard minus labels: [+-]0\.\d+; too few for an interval\.", lead[1])
        assert "too few for an interval: 2 of 3 seeds and 2 of 5 cases: liver, spleen, mean" in page
        assert "difference to labels" in page
        assert "not an equal budget" not in page

    def test_lists_among_the_settings_read_as_words(self) -> None:
        assert tables._value(["model.1", "model.2"]) == "model.1, model.2"
        assert (tables._value([]), tables._value(None), tables._value("")) == ("–", "–", '""')

    def test_the_figure_shows_both(self, compared: tuple[Path, Results, Path]) -> None:
        image = matplotlib.image.imread(compared[2] / "validation.png")[..., :3]
        assert image.shape[0] > 400
        for colour in ((0x31, 0x82, 0xBD), (0xE6, 0x55, 0x0D)):
            near = np.abs(image - np.array(colour) / 255).max(axis=2) < 0.02
            assert near.sum() > 50

    def test_intervals_stand_beside_their_differences(
        self,
        compared: tuple[Path, Results, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(statistics, "MIN_SEEDS", 2)
        monkeypatch.setattr(statistics, "MIN_CASES", 2)
        results = dataclasses.replace(compared[1])
        found = results.differences("hard", "Dice")["liver"]
        assert found.low is not None
        assert found.high is not None
        assert found.low <= (found.mean or 0) <= found.high
        said = f'hard</th><td class="num">{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]<'
        assert said in to_html(results)
        print_results(results)
        assert f"[{found.low:+.3f}, {found.high:+.3f}]" in capsys.readouterr().out
        write_results(results, tmp_path)
        table = list(csv.DictReader((tmp_path / "validation_table.csv").open()))
        hard = next(r for r in table if (r["config"], r["metric"]) == ("hard", "Dice"))
        assert (float(hard["low"]), float(hard["high"])) == (found.low, found.high)

    def test_a_second_call_trains_and_scores_nothing(
        self, finished: Path, reads: list[tuple[str, int]]
    ) -> None:
        before = snapshot(finished.parent)
        assert not run(finished).failed
        assert snapshot(finished.parent) == before
        assert not [name for name, _ in reads if name.endswith("image")]

    def test_scores_of_another_student_are_not_taken(self, finished: Path) -> None:
        path = students(finished) / "hard-seed0" / "scores_validation.json"
        kept = path.read_text()
        path.write_text(kept.replace('"key": "', '"key": "0'))
        run(finished)
        assert path.read_text() == kept

    def test_scores_by_other_rules_are_made_anew(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = students(finished) / "hard-seed0" / "scores_validation.json"
        kept = path.read_text()
        monkeypatch.setattr(scoring, "RULES", 1)
        run(finished)
        assert path.read_text() != kept
        monkeypatch.undo()
        run(finished)
        assert path.read_text() == kept

    def test_scores_of_a_case_whose_organ_turned_out_to_be_lost_are_made_anew(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = students(finished) / "hard-seed0" / "scores_validation.json"
        kept = path.read_text()
        monkeypatch.setattr(scoring, "swallowed_organs", lambda cases: {"swallowed_organs": "x"})
        run(finished)
        assert path.read_text() != kept
        monkeypatch.undo()
        run(finished)
        assert path.read_text() == kept

    def test_more_seeds_and_configurations_reuse_what_is_there(self, finished: Path) -> None:
        before = (students(finished) / "hard-seed0" / "student.pt").stat().st_mtime_ns
        more = [*two(), config("lower", optimiser={"lr": 1e-4})]
        found = plan(finished, more, seeds=(1, 0, 2))
        assert [r.folder.name for r in found.runs if not r.finished] == [
            "lower-seed1", "lower-seed0", "labels-seed2", "hard-seed2", "lower-seed2",
        ]  # fmt: skip
        results = run(finished, more, seeds=(0,))
        assert results.configs == ("labels", "hard", "lower")
        assert (students(finished) / "hard-seed0" / "student.pt").stat().st_mtime_ns == before
        assert "optimiser.lr" in to_html(results)
        assert "shows no significance" in to_html(results)

    def test_test_cases_are_scored_on_request_and_it_is_written_down(
        self, finished: Path, tmp_path: Path
    ) -> None:
        results = run(finished, test=True, surface=False)
        write_results(results, tmp_path / "out")
        content = json.loads((tmp_path / "out" / "test.json").read_text())
        assert content["cases"] == ["multi-ct/case_001", "multi-ct/case_002"]
        assert content["test_cases_were_scored"] is True
        assert content["num_configurations"] == 2
        assert len(content["runs_ever_scored_on_test"]) == 4
        assert "no longer tested by it" in to_html(results)
        assert list(content["configurations"][0]["scores"]) == ["Dice"]


class TestInterruptions:
    def test_a_stopped_comparison_goes_on_to_the_same_end(
        self, tiny_cached: Path, compared: tuple[Path, Results, Path]
    ) -> None:
        in_the_second = at_step(STEPS + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with in_the_second, pytest.raises(Stopped, match="run 2 of 4, hard-seed0") as caught:
            run(tiny_cached)
        assert "Run the same command again" in str(caught.value)
        first = snapshot(students(tiny_cached) / "labels-seed0")
        assert [r.finished for r in plan(tiny_cached).runs] == [True, False, False, False]
        results = run(tiny_cached)
        kept = snapshot(students(tiny_cached) / "labels-seed0")
        assert {name: kept[name] for name in first} == first
        straight = compared[1]
        assert [r.rows for r in results.runs] == [r.rows for r in straight.runs]
        ours = weights(tiny_cached, "hard-seed0")
        theirs = weights(compared[0], "hard-seed0")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_a_signal_in_a_runs_last_step_begins_no_other(self, tiny_cached: Path) -> None:
        in_the_last = at_step(STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with in_the_last, pytest.raises(Stopped, match="run 1 of 4, labels-seed0: a signal came"):
            run(tiny_cached)
        assert [r.finished for r in plan(tiny_cached).runs] == [True, False, False, False]

    def test_a_run_that_fails_is_marked_and_the_others_go_on(
        self, tiny_cached: Path, tmp_path: Path
    ) -> None:
        with at_step(3 * STEPS + 1, broken):  # in the last of four
            results = run(tiny_cached)
        assert [(r.config, r.seed) for r in results.failed] == [("hard", 1)]
        assert "hard, seed 1 failed and is in no number" in to_html(results)
        assert "1/2 FAILED" in to_html(results)
        assert results.estimates("hard", "Dice")["liver"].per_seed[1] is None
        assert results.differences("hard", "Dice")["liver"].num_seeds == 1
        write_results(results, tmp_path / "out")
        runs = json.loads((tmp_path / "out" / "validation.json").read_text())
        assert "became NaN" in runs["configurations"][1]["runs"][1]["error"]
        assert not run(tiny_cached).failed  # it is tried again

    def test_where_all_fail_there_is_no_table(self, tiny_cached: Path) -> None:
        with ExitStack() as each:
            for first in range(1, 5):
                each.enter_context(at_step(first, broken))
            with pytest.raises(PipelineError, match="all 4 runs failed"):
                run(tiny_cached)

    def test_other_settings_under_the_same_name_are_refused_first(self, finished: Path) -> None:
        before = snapshot(finished.parent)
        with pytest.raises(CheckpointError, match=r"config\.steps: 2 -> 3") as caught:
            plan(finished, steps=3)
        assert "--name" in str(caught.value)
        with pytest.raises(CheckpointError, match=r"config\.optimiser\.lr: 0\.002 -> 0\.1"):
            plan(finished, [config("labels", optimiser={"lr": 0.1})])
        assert snapshot(finished.parent) == before


def test_a_student_of_another_origin_stays(tiny_cached: Path) -> None:
    folder = work_of(tiny_cached) / "students" / settings().name / "labels-seed0"
    folder.mkdir(parents=True)
    (folder / "student.pt").write_text("mine")
    with pytest.raises(ConfigError, match=r"student\.pt: `pipeline train-student` did not write"):
        plan(tiny_cached)
    assert [path.read_text() for path in folder.iterdir()] == ["mine"]


def test_flags_of_speed_reach_every_run(tiny_cached: Path) -> None:
    seen: list[bool] = []

    def look(optimiser: torch.optim.Optimizer, *_: object) -> None:
        weights = (w for group in optimiser.param_groups for w in group["params"] if w.ndim == 5)
        seen.append(all(w.is_contiguous(memory_format=torch.channels_last_3d) for w in weights))

    planned = plan(tiny_cached, [config("labels")], steps=1)
    handle = register_optimizer_step_pre_hook(look)
    try:
        flags = SpeedFlags(channels_last=True)
        compare(planned, scope(tiny_cached), TrainingExecution("cpu", flags=flags))
    finally:
        handle.remove()
    assert seen == [True] * len(planned.runs)


class TestBudget:
    def test_seconds_become_steps_once(
        self, tiny_cached: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        speeds = iter([0.5, 0.2, 0.4, 0.25])  # two rounds of two configurations
        with monkeypatch.context() as context:
            context.setattr(budget, "_probe", lambda *rest: next(speeds))
            first = plan(tiny_cached, seconds=2.0)
        assert first.steps == {"labels": 5, "hard": 10}  # by the faster round
        assert [r.config.training.steps for r in first.runs] == [5, 10, 5, 10]
        monkeypatch.setattr(budget, "_probe", lambda *rest: pytest.fail("measured again"))
        assert plan(tiny_cached, seconds=2.0).steps == first.steps
        assert any("fit in 2 s" in notice for notice in first.notices)
        looked = plan(tiny_cached, seconds=2.0, measure=False)
        assert [r.config.training.steps for r in looked.runs] == [5, 10, 5, 10]
        with pytest.raises(ConfigError, match=r"begun with 2\.0 seconds, not 3"):
            plan(tiny_cached, seconds=3.0)

    def test_a_probe_measures_a_step_and_leaves_nothing(self, tiny_cached: Path) -> None:
        before = snapshot(work_of(tiny_cached))
        found = plan(tiny_cached, seconds=0.5)
        assert all(steps >= 1 for steps in found.steps.values())
        record = students(tiny_cached) / "budget.json"
        content = json.loads(record.read_text())
        assert all(0 < s < 5 for s in content["seconds_per_step"].values())
        after = snapshot(work_of(tiny_cached))
        assert set(after) - set(before) == {
            "students", "students/both", "students/both/budget.json"
        }  # fmt: skip

    def test_different_steps_need_a_budget(self, tiny_cached: Path) -> None:
        configs = [config("labels", steps=2), config("hard", "pseudo_label", steps=3)]
        with pytest.raises(ConfigError, match="steps labels 2, hard 3") as caught:
            plan(tiny_cached, configs)
        assert "--steps or --seconds" in str(caught.value)
        assert plan(tiny_cached, configs, steps=4).steps == {"labels": 4, "hard": 4}

    def test_another_network_is_told(self, tiny_cached: Path) -> None:
        wide = training_settings()["network"]
        wide = {**wide, "args": {**wide["args"], "channels": [8, 8, 8]}}
        found = plan(tiny_cached, [config("small"), config("wide", network=wide)])
        assert any("not an equal budget in compute: network differ" in n for n in found.notices)
        assert found.parameters["wide"] > found.parameters["small"]


class TestBadInput:
    @pytest.mark.parametrize(
        ("configs", "changes", "said"),
        [
            ([], {}, "no configuration"),
            ([config("a"), config("a", "naive")], {}, "2 configurations are called 'a'"),
            ([config("a"), config("b")], {}, "'a' and 'b' have the same content"),
            ([config("a"), config("b", seed=3)], {}, "have the same content"),
            ([config("a/b")], {}, "a run of another comparison"),
            (two(), {"baseline": "c"}, "no configuration 'c'"),
            (two(), {"name": "a/b"}, "cannot name a comparison"),
            (two(), {"seeds": ()}, "at least one"),
            (two(), {"seeds": (1, 1)}, "each another"),
            (two(), {"seeds": (-1,)}, "negative"),
            (two(), {"steps": 2, "seconds": 2.0}, "two budgets"),
            (two(), {"seconds": 0.0}, "more than 0"),
        ],
    )
    def test_it_is_said_before_anything_is_written(
        self,
        built_cache: Path,
        configs: list[TrainStudentConfig],
        changes: dict[str, Any],
        said: str,
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            plan(built_cache, configs, **changes)
        assert not (work_of(built_cache) / "students").exists()

    def test_an_organ_that_no_case_annotates_is_named(self, tiny_cached: Path) -> None:
        def only_liver(data: dict[str, Any]) -> None:
            data["datasets"]["multi-ct"]["split"]["validation"] = []
            data["datasets"]["spleen-ct"]["split"] = {"validation": 0.0, "test": 0.0, "seed": 0}

        fill_cache(change_registry(tiny_cached, only_liver))
        results = run(tiny_cached, seeds=(0,))
        assert any("annotates spleen: it cannot be compared" in n for n in results.notices)
        found = results.estimates("labels", "Dice")
        assert found["spleen"].mean is None
        assert found["mean"].mean == found["liver"].mean
        assert ">labels</th>" in to_html(results)
        assert ">–</td>" in to_html(results)

    def test_without_a_validation_case_there_is_nothing_to_compare_on(
        self, tiny_cached: Path
    ) -> None:
        def none(data: dict[str, Any]) -> None:
            for dataset in data["datasets"].values():
                dataset["split"] = {"validation": 0.0, "test": 0.0, "seed": 0}

        fill_cache(change_registry(tiny_cached, none))
        with pytest.raises(ConfigError, match="no validation case to compare on"):
            plan(tiny_cached)

    def test_missing_cases_are_refused_or_left_out(self, tiny_cached: Path) -> None:
        (gone,) = (work_of(tiny_cached) / "cases" / "multi-ct").glob("case_000@*")
        shutil.rmtree(gone)
        with pytest.raises(CacheMissing, match="multi-ct/case_000"):
            plan(tiny_cached)
        assert len(plan(tiny_cached, allow_missing=True).cases) == 2

    def test_a_case_that_stage_one_could_not_take_is_missing_too(self, tiny_cached: Path) -> None:
        loaded, work = load_registry(tiny_cached), work_of(tiny_cached)
        lost = loaded.resolve("data/multi-ct/images/case_000.nii.gz")
        lost.write_text("x\n")
        run_cache(cache_config(), loaded, work, log=Log(quiet=True), device="cpu", tables=False)
        with pytest.raises(CacheMissing, match=r"1 validation cases .*multi-ct/case_000") as caught:
            plan(tiny_cached)
        assert "stage one left this case out" in str(caught.value)
        found = plan(tiny_cached, allow_missing=True)
        assert len(found.cases) == 2
        assert found.notices[0] == (
            "validation cases that are left out, as the cache lacks them: multi-ct/case_000."
        )


def test_the_command_line(compared: tuple[Path, Results, Path], tmp_path: Path) -> None:
    registry = compared[0]
    for one in two():
        values = {"training": one.model_dump(mode="json")["training"]}
        (tmp_path / f"{one.run}.yaml").write_text(yaml.safe_dump(values))
    paths = [tmp_path / "labels.yaml", tmp_path / "hard.yaml"]
    assert [c.run for c in load_configurations(paths)] == ["labels", "hard"]
    command = [
        "compare", *map(str, paths), "--seeds", "0,1", "-r", str(registry),
        "-w", str(work_of(registry)), "-o", str(tmp_path / "both"), "--device", "cpu",
    ]  # fmt: skip
    dry = CliRunner().invoke(cli.app, [*command, "--seeds", "0,2", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert [line.split()[0] for line in dry.stdout.splitlines()] == ["finished"] * 2 + ["to"] * 2
    assert not (tmp_path / "both").exists()
    theirs = tmp_path / "both" / "validation.html"
    theirs.parent.mkdir()
    theirs.write_text("notes on our validation")
    refused = CliRunner().invoke(cli.app, command)
    assert isinstance(refused.exception, ConfigError)
    assert f"{theirs}: `pipeline compare` did not write this file" in str(refused.exception)
    assert theirs.read_text() == "notes on our validation"
    theirs.unlink()
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "difference to labels" in done.stdout
    written = (tmp_path / "both" / "validation_scores.csv").read_text()
    assert written == (compared[2] / "validation_scores.csv").read_text()
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    wrong = CliRunner().invoke(cli.app, [*command, "--seeds", "0;1"])
    assert isinstance(wrong.exception, ConfigError)
