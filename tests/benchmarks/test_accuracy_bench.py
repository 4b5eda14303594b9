"""The bench of accuracy: its pure parts against slow, plain versions of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy import tables
from benchmarks.accuracy.collect import Scores, as_array, collect, note_tried
from benchmarks.accuracy.configurations import (
    KINDS,
    ORACLE,
    Configuration,
    identity,
    named,
    screened,
)
from benchmarks.accuracy.findings import BETTER, find
from benchmarks.accuracy.plan import choose, equal_time_steps, plan_jobs, work_done
from benchmarks.accuracy.recall import worth
from benchmarks.accuracy.regimes import REGIMES, Regime, drawn_seed
from benchmarks.accuracy.registries import phantoms, registries
from benchmarks.accuracy.size import FULL, TINY
from benchmarks.accuracy.statistics import (
    Floats,
    draws,
    over_seeds,
    seed_means,
    spread,
    stratified,
)
from pipeline.data.entries import ORGANS
from pipeline.data.registry import Registry
from pipeline.errors import ConfigError
from pipeline.student.sampling import SamplingConfig
from stages.compare.plan import differing_fields
from stages.train_student import TrainStudentConfig

SEEDS, CASES = 4, 6


def made_scores(seed: int, level: float = 0.6) -> Floats:
    """(S, N, K) with holes: some organs are absent from some cases."""
    rng = np.random.default_rng(seed)
    scores = level + 0.1 * rng.standard_normal((SEEDS, CASES, len(ORGANS)))
    scores[0, 1, 2] = scores[2, :3, 0] = np.nan
    return np.asarray(scores)


def slow_seed_mean(scores: Floats, s: int, cases: list[int]) -> list[float]:
    """Per organ the plain mean of what is known over `cases`, and over organs."""
    means = []
    for k in range(scores.shape[2]):
        known = [scores[s, n, k] for n in cases if not np.isnan(scores[s, n, k])]
        means.append(sum(known) / len(known) if known else np.nan)
    known = [m for m in means if not np.isnan(m)]
    return [*means, sum(known) / len(known) if known else np.nan]


def slow_over_seeds(rows: list[list[float]]) -> list[float]:
    """Column by column the mean of what is known."""
    found = []
    for column in zip(*rows, strict=True):
        known = [v for v in column if not np.isnan(v)]
        found.append(sum(known) / len(known) if known else np.nan)
    return found


# --- data ----------------------------------------------------------------------------------------


def images(content: Mapping[str, Any], split: str) -> set[tuple[str, str]]:
    """(root, case) of a split of a registry, whatever its datasets are called."""
    return {(d["root"], c) for d in content["datasets"].values() for c in d["split"][split]}


@pytest.mark.parametrize("regime", REGIMES.values(), ids=lambda r: r.key)
@pytest.mark.parametrize("size", [FULL, TINY], ids=lambda s: s.name)
def test_no_ct_has_two_purposes(regime: Regime, size: Any) -> None:
    found = registries(regime, size)
    train = images(found["student"], "train")
    validation, test = images(found["student"], "validation"), images(found["test"], "test")
    outside = images(found["outside"], "train") if "outside" in found else set()
    parts = [train, validation, test, outside]
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert train == images(found["full"], "train")
    specs = phantoms(regime, size, 0)
    made = {(f"phantom/{n}", f"case_{i:03d}") for n, s in specs.items() for i in range(s.num_cases)}
    assert set().union(*parts) == made
    num = min(regime.train_cases, size.most_cases)
    assert (len(train), len(validation), len(test)) == (
        4 * num,
        4 * size.validation_cases + size.multi_validation_cases,
        4 * size.test_cases + size.multi_test_cases,
    )


@pytest.mark.parametrize("regime", REGIMES.values(), ids=lambda r: r.key)
def test_registries_say_what_their_user_may_know(regime: Regime) -> None:
    found = {n: Registry.model_validate(c) for n, c in registries(regime, FULL).items()}
    for organ in ORGANS:
        entry = found["student"].datasets[f"{organ}-ct"]
        assert entry.annotated == {organ: (ORGANS.index(organ) + 1,)}
        assert {*entry.background_values, ORGANS.index(organ) + 1} == {1, 2, 3, 4}
        assert tuple(found["full"].datasets[f"{organ}-ct"].annotated) == ORGANS
        trainer = found["outside" if regime.outside_cases else "student"]
        suffix = "outside" if regime.outside_cases else "ct"
        assert trainer.teachers[organ].trained_on == f"{organ}-{suffix}"
    assert all(tuple(d.annotated) == ORGANS for d in found["test"].datasets.values())


@pytest.mark.parametrize("seed", range(5))
def test_the_weak_teacher_alone_has_other_data(seed: int) -> None:
    weak = REGIMES["e"].weak
    assert weak is not None
    specs = phantoms(REGIMES["e"], FULL, seed)
    for organ in ORGANS:
        spec = specs[f"{organ}-outside"]
        if organ == weak.organ:
            assert (spec.num_cases, spec.shift, spec.seed % 3) == (
                weak.cases, weak.shift, weak.phase,
            )  # fmt: skip
        else:
            assert (spec.num_cases, spec.shift) == (30, 0.0)


def test_worth_of_a_teacher() -> None:
    counts = np.array([[8, 10, 10], [0, 4, 10], [0, 0, 0]])
    found = worth(counts)
    assert found == {"recall": 8 / 20, "precision": 8 / 14, "dice": 16 / 34, "missed_cases": 1}
    nothing = worth(np.zeros((2, 3), np.int64))
    assert nothing == {"recall": None, "precision": None, "dice": None, "missed_cases": 0}


# --- configurations ------------------------------------------------------------------------------


def test_kinds_differ_in_supervision_alone() -> None:
    configs = [TrainStudentConfig(run=c.name, training=c.training) for c in named(FULL, KINDS)]
    assert {field.split(".")[0] for field in differing_fields(configs)} == {"supervision"}
    assert {c.training.sampling for c in configs} == {SamplingConfig()}  # as the product has it
    method, perfect = named(FULL, ["ms_kd", ORACLE])
    assert not method.training.supervision.uses_features
    assert (method.teachers, perfect.teachers) == ("cached", "perfect")


def test_identity_is_of_what_counts() -> None:
    kinds = {c.name: c.training for c in named(FULL, KINDS)}
    assert len({identity(training) for training in kinds.values()}) == len(KINDS)

    def changed(kind: str, **supervision: Any) -> str:
        old = kinds[kind]
        new = old.supervision.model_copy(update=supervision)
        return identity(old.model_copy(update={"supervision": new, "steps": 7, "seed": 9}))

    assert changed("marginal", margin=1.0) == identity(kinds["marginal"])
    assert changed("ms_kd") == identity(kinds["ms_kd"])
    assert changed("ms_kd", margin=1.0) != identity(kinds["ms_kd"])
    assert changed("pseudo_label", margin=1.0) == identity(kinds["pseudo_label"])
    assert changed("pseudo_label", confidence=1.0) != identity(kinds["pseudo_label"])
    weaker = kinds["marginal_exclusion"].supervision.exclusion.model_copy(update={"weight": 0.5})
    assert changed("marginal_exclusion", exclusion=weaker) != identity(kinds["marginal_exclusion"])


def test_screened_configurations_change_the_method(tmp_path: Path) -> None:
    (tmp_path / "constant.yaml").write_text("supervision: {logits: {schedule: constant}}\n")
    (tmp_path / "hard.yaml").write_text("supervision: {kind: pseudo_label}\noptimiser: {lr: 0.1}\n")
    (method,) = named(FULL, ["ms_kd"])
    constant, hard = screened(FULL, tmp_path)
    assert [constant.name, hard.name] == ["constant", "hard"]
    expected = method.training.model_dump()
    expected["supervision"]["logits"]["schedule"] = "constant"
    assert constant.training.model_dump() == expected
    assert hard.training.optimiser.lr == 0.1
    assert hard.training.supervision.kind == "pseudo_label"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("marginal", "supervision: {margin: 1.0}", "marginal is a row of the bench"),
        ("typo", "supervision: {marign: 1.0}", "marign"),
        ("list", "[1, 2]", "mapping"),
        ("a b", "supervision: {margin: 1.0}", "cannot name a run"),
        ("same", "supervision: {margin: 0.0}", "the same as ms_kd"),
        ("seeded", "seed: 3", "seed"),
    ],
)
def test_a_mistake_in_a_screened_one_is_said(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        screened(FULL, tmp_path)
    assert name in str(caught.value)
    assert caught.value.exit_code == 2


# --- plan ----------------------------------------------------------------------------------------


def test_plan_of_jobs(tmp_path: Path) -> None:
    regimes = [REGIMES["a"], REGIMES["d"]]
    chosen = choose(FULL, ["short", "long"], None, [])
    extra = equal_time_steps(
        FULL, ["short", "long"], {"ms_kd": 0.03, "marginal": 0.02, "pseudo_label": 0.04}
    )
    assert extra == {("short", "marginal"): 225, ("long", "marginal"): 675}
    jobs = plan_jobs(tmp_path, regimes, [5, 6], FULL, chosen, extra)
    assert [job.name for job in jobs] == ["a/seed5", "d/seed5", "a/seed6", "d/seed6"]
    for job in jobs:
        assert [(r.budget, r.name) for r in job.runs] == [
            *(("short", row) for row in (*KINDS, ORACLE)),
            *(("long", k) for k in ("marginal", "pseudo_label", "ms_kd", "full", ORACLE)),
            ("short, equal time", "marginal"),
            ("long, equal time", "marginal"),
        ]
        assert len({run.folder for run in job.runs}) == len(job.runs)
        assert {run.registry for run in job.runs if run.name == "full"} == {"full"}
        assert {run.training["seed"] for run in job.runs} == {
            drawn_seed(job.regime, job.seed, "students")
        }
    assert [run.steps for run in jobs[0].runs[-2:]] == [225, 675]


def test_what_is_done_is_read_from_the_disk(tmp_path: Path) -> None:
    chosen = choose(FULL, ["short"], ["marginal", "full"], [])
    (job,) = plan_jobs(tmp_path, [REGIMES["b"]], [0], FULL, chosen)
    cohort = 8 * FULL.teacher_steps
    assert work_done(job, FULL, "validation", False) == (0, cohort + 300)
    job.folder.mkdir(parents=True)
    (job.folder / "cohort.json").write_text("{}")
    write_scores(job.run_folder(job.runs[0]), "validation", 0.5)
    assert work_done(job, FULL, "validation", False) == (cohort + 150, cohort + 300)
    assert work_done(job, FULL, "test", False) == (cohort, cohort + 300)
    assert work_done(job, FULL, "test", True) == (cohort, cohort)


# --- scores --------------------------------------------------------------------------------------


def write_scores(folder: Path, split: str, dice: float) -> None:
    """As `score_student` writes them: one case, all organs."""
    place = {"case": "multi-ct/case_000", "n_ref": 9}
    rows = [{**place, "organ": organ, "Dice": dice} for organ in ORGANS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"scores_{split}.json").write_text(json.dumps({"key": "", "rows": rows}))


def test_rows_become_arrays() -> None:
    rows = {
        7: [
            {"case": "b/1", "organ": "spleen", "Dice": 0.5, "n_ref": 4},
            {"case": "a/1", "organ": "liver", "Dice": None, "n_ref": 0},
            {"case": "a/1", "organ": "spleen", "Dice": 0.0, "n_ref": 0},  # invented: has no pair
        ],
        9: [{"case": "b/1", "organ": "liver", "Dice": 0.25, "n_ref": 4}],
    }
    found = as_array(rows, [9, 8, 7])
    expected = np.full((3, 2, 4), np.nan)
    expected[2, 1, 1], expected[0, 1, 0] = 0.5, 0.25
    np.testing.assert_array_equal(found, expected)


def test_collected_scores_and_what_is_missing(tmp_path: Path) -> None:
    chosen = choose(FULL, ["short"], ["marginal", "ms_kd"], [])
    jobs = plan_jobs(tmp_path, [REGIMES["a"]], [0, 1], FULL, chosen)
    for job, run, dice in ((0, 0, 0.1), (0, 1, 0.2), (1, 1, 0.4)):
        write_scores(jobs[job].run_folder(jobs[job].runs[run]), "validation", dice)
    scores = collect(jobs, "validation")
    assert scores.missing == ["a/seed1: short/marginal"]
    np.testing.assert_allclose(scores.arrays["a", "short", "ms_kd"][:, 0, 0], [0.2, 0.4])
    np.testing.assert_array_equal(
        np.isnan(scores.arrays["a", "short", "marginal"]).all(axis=(1, 2)), [False, True]
    )
    assert collect(jobs, "test").arrays == {}


def test_what_was_tried_stays_on_record(tmp_path: Path) -> None:
    changed = named(FULL, ["ms_kd"])[0].training
    changed = changed.model_copy(update={"batch_size": 3})
    others = [Configuration("other", changed), Configuration("in-the-loop", changed, "online")]
    chosen = choose(FULL, ["short", "long"], ["ms_kd"], others)
    (job,) = plan_jobs(tmp_path, [REGIMES["a"]], [0], FULL, chosen)
    for run in job.runs:
        write_scores(job.run_folder(run), "validation", 0.5)
    write_scores(job.run_folder(job.runs[0]), "test", 0.5)
    tried = note_tried(tmp_path)
    digits = identity(changed)[:10]
    assert tried["validation"][digits] == {
        "names": ["other"], "steps": [150, 450], "jobs": ["a/seed0"],
    }  # fmt: skip
    assert tried["validation"][f"{digits}-online"]["names"] == ["in-the-loop"]
    assert (len(tried["validation"]), len(tried["test"])) == (3, 1)
    for run in job.runs:
        (job.run_folder(run) / "scores_validation.json").unlink()
    assert note_tried(tmp_path) == tried


# --- statistics ----------------------------------------------------------------------------------


def test_means_against_slow_ones() -> None:
    scores = made_scores(0)
    scores[1, :, 3] = np.nan
    slow = [slow_seed_mean(scores, s, list(range(CASES))) for s in range(SEEDS)]
    np.testing.assert_allclose(seed_means(scores), slow)
    np.testing.assert_allclose(over_seeds(scores), slow_over_seeds(slow))
    whole = made_scores(1)
    slow = [slow_seed_mean(whole, s, list(range(CASES))) for s in range(SEEDS)]
    mean = [sum(column) / SEEDS for column in zip(*slow, strict=True)]
    expected = [
        (sum((row[k] - mean[k]) ** 2 for row in slow) / (SEEDS - 1)) ** 0.5 for k in range(5)
    ]
    np.testing.assert_allclose(spread(whole), expected)
    assert np.isnan(spread(whole[:1])).all()


def test_draws_are_of_seeds_and_of_cases_within_them() -> None:
    apart = made_scores(2, level=0.02)
    found = draws(apart, np.random.default_rng(5), 50)
    rng = np.random.default_rng(5)
    drawn = rng.integers(SEEDS, size=(50, SEEDS))
    counts = rng.multinomial(CASES, np.full(CASES, 1 / CASES), size=(50, SEEDS))
    for d in range(50):
        rows = []
        for slot, s in enumerate(drawn[d]):
            cases = [n for n in range(CASES) for _ in range(counts[d, slot, n])]
            rows.append(slow_seed_mean(apart, int(s), cases))
        np.testing.assert_allclose(found[d], slow_over_seeds(rows))


def test_regimes_count_the_same() -> None:
    parts = [(np.full(5, 0.1), np.full((3, 5), 0.2)), (np.full(5, 0.3), np.full((3, 5), 0.6))]
    mean, drawn = stratified(parts)
    np.testing.assert_allclose(mean, 0.2)
    np.testing.assert_allclose(drawn, 0.4)
    # Two independent regimes of the same spread: their mean's is smaller by the root of two.
    rng = np.random.default_rng(1)
    each = [(np.zeros(1), rng.standard_normal((20_000, 1))) for _ in range(2)]
    assert stratified(each)[1].std() == pytest.approx(0.5**0.5, rel=0.03)


# --- findings ------------------------------------------------------------------------------------


def made_findings(regimes: tuple[str, ...] = ("a", "b")) -> tuple[Scores, dict[str, Any]]:
    """In a pseudo_label is the better baseline, in b marginal; one seed of b is unfinished."""
    level = {"marginal": 0.60, "pseudo_label": 0.65, "ms_kd": 0.68, "mine": 0.70, "full": 0.80}
    arrays = {}
    for r, regime in enumerate(regimes):
        for n, (name, dice) in enumerate(level.items()):
            here = dice - 0.1 * (regime == "b" and name == "pseudo_label")
            arrays[regime, "short", name] = made_scores(10 * r + n, here)
    arrays["b", "short", "ms_kd"][3] = np.nan
    arrays["a", "short, equal time", "marginal"] = made_scores(50, 0.9)
    steps = dict.fromkeys(arrays, 300)
    scores = Scores(arrays, range(SEEDS), [], steps)
    return scores, find(scores, 400)


def test_findings_against_slow_ones() -> None:
    scores, found = made_findings()
    by_name = found["differences"]["equal steps"]["short"]
    assert list(by_name) == ["ms_kd", "mine"]
    everyone = list(range(CASES))
    for regime, seeds in (("a", range(4)), ("b", range(3))):
        apart = scores.arrays[regime, "short", "ms_kd"] - scores.arrays[regime, "short", "marginal"]
        slow = slow_over_seeds([slow_seed_mean(apart, s, everyone) for s in seeds])
        row = by_name["ms_kd"]["marginal"][regime]
        assert row["num_seeds"] == len(seeds)
        assert [row[c]["mean"] for c in (*ORGANS, "mean")] == pytest.approx(slow)
        assert row["mean"]["low"] < slow[-1] < row["mean"]["high"]
        worst = found["worst_organ"]["short"]["ms_kd"][regime]
        assert worst["organ"] == ORGANS[int(np.argmin(slow[:-1]))]
        assert worst["mean"] == pytest.approx(min(slow[:-1]))
    rows = by_name["ms_kd"]["marginal"]
    middle = (rows["a"]["mean"]["mean"] + rows["b"]["mean"]["mean"]) / 2
    assert rows["all"]["mean"]["mean"] == pytest.approx(middle)
    widths = [rows[r]["mean"]["high"] - rows[r]["mean"]["low"] for r in ("a", "b", "all")]
    assert widths[2] < max(widths[:2])


def test_equal_steps_and_equal_time_stand_side_by_side() -> None:
    _, found = made_findings()
    content = {"findings": found}
    table = tables._headline(content)
    assert [row[:2] for row in table.rows] == [["short", "a"], ["short", "b"], ["short", "all"]]
    steps, time = (
        f"{found['differences'][terms]['short']['ms_kd'][BETTER]['a']['mean']['mean']:+.3f}"
        for terms in ("equal steps", "equal time")
    )
    assert steps != time
    assert table.rows[0][2].startswith(steps)
    assert table.rows[0][3].startswith(time)


def test_the_better_baseline_is_chosen_by_regime() -> None:
    _, found = made_findings()
    by_baseline = found["differences"]["equal steps"]["short"]["ms_kd"]
    better = by_baseline[BETTER]
    assert (better["a"]["against"], better["b"]["against"]) == ("pseudo_label", "marginal")
    assert better["a"]["mean"] == by_baseline["pseudo_label"]["a"]["mean"]
    assert better["b"]["mean"] == by_baseline["marginal"]["b"]["mean"]
    assert 0.1 < found["gap_closed"]["short"]["ms_kd"]["a"] < 0.4


def test_equal_time_takes_the_longer_training_of_a_baseline() -> None:
    scores, found = made_findings()
    rows = found["differences"]["equal time"]["short"]["ms_kd"]
    apart = (
        scores.arrays["a", "short", "ms_kd"] - scores.arrays["a", "short, equal time", "marginal"]
    )
    assert rows["marginal"]["a"]["mean"]["mean"] == pytest.approx(over_seeds(apart)[-1])
    equal = found["differences"]["equal steps"]["short"]["ms_kd"]
    # One that is as slow as the method has no longer training.
    assert rows["pseudo_label"]["a"]["mean"] == equal["pseudo_label"]["a"]["mean"]
    assert rows[BETTER]["a"]["against"] == "marginal"


# --- picture -------------------------------------------------------------------------------------
