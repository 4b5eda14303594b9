"""`pipeline report` as it is typed: what stands on the page, and what it says where something is
missing."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import file_sha256
from pipeline.consensus.cohort import open_cohort
from pipeline.data.registry import load_registry
from pipeline.errors import CheckpointError, ConfigError, PipelineError, WorkFolderError
from pipeline.log import Log
from pipeline.review.inspect.run import inspect_cohort
from pipeline.review.metrics import RULES, OrganScore, sha256_if_there, summarise
from pipeline.review.report import page as make
from stages.compare.scoring import ScoringSettings, score_student
from tests.stages.stage_contract import snapshot
from tests.tiny import ORGANS, change_registry, work_of
from tests.unit.review.report.pages import RUN, Element, call, folder_of, page, parse, recorded

if TYPE_CHECKING:
    from upath import UPath

# What somebody asks first stands first.
SECTIONS = ("scores", "cases", "conflicts", "training", "gate", "regions", "lineage", "about")
HOSTILE = "<img src=x onerror=alert(1)> \"'</script><b>"


@pytest.fixture(scope="module")
def made(built_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Element:
    """The page of the run with teachers; tests that only read share it."""
    return page(built_runs, tmp_path_factory.mktemp("page") / "report.html")


def cells(table: Element) -> list[list[str]]:
    return [
        [cell.text for cell in row.parts if isinstance(cell, Element)] for row in table.all("tr")
    ]


def table_with(section: Element, caption: str) -> Element:
    (found,) = (t for t in section.all("table") if t.one("caption").text.startswith(caption))
    return found


def absent(section: Element) -> str:
    return " ".join(e.text for e in section.all() if "absent" in e.attributes.get("class", ""))


def error_of(registry: Path, output: Path | None, *arguments: str, run: str = RUN) -> PipelineError:
    before = snapshot(registry.parent)
    error = call(registry, output, *arguments, run=run).exception
    assert isinstance(error, PipelineError)
    assert snapshot(registry.parent) == before
    assert output is None or not output.exists()
    return error


def test_every_section_is_there_and_the_navigation_leads_to_it(made: Element) -> None:
    assert tuple(s.attributes["id"] for s in made.all("section")) == SECTIONS
    assert [a.attributes["href"] for a in made.one("nav").all("a")] == [f"#{s}" for s in SECTIONS]
    ids = [e.attributes["id"] for e in made.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_nothing_on_the_page_comes_from_elsewhere(made: Element) -> None:
    for element in made.all():
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            value = element.attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")), (element.tag, value)
        assert "url(" not in element.attributes.get("style", "")
    assert not made.all("link")
    assert not made.all("iframe")
    assert not re.search(r"@import|url\(|https?:", made.one("style").text)
    policy = made.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_lineage_goes_down_to_the_weights(built_runs: Path, made: Element) -> None:
    inputs = recorded(built_runs)["inputs"]
    lineage = made.one("section", id="lineage")
    finished = json.loads((folder_of(built_runs) / "finished.json").read_text())
    assert finished["run_digest"] in made.one("header").text
    groups = table_with(lineage, "Teachers").all("tbody")
    assert [g.one("th").text for g in groups] == list(inputs["teachers"])
    whole = json.loads(made.one("script", id="lineage-json").text)
    assert whole["run_digest"] == finished["run_digest"]
    for group, (name, digest) in zip(groups, inputs["teachers"].items(), strict=True):
        found = whole["teachers"][name]
        assert found["digest"] == digest
        assert group.text.endswith(f"weights {found['weights_sha256']} teacher {digest}")
        receipts = work_of(built_runs).glob(f"teachers/{name}@*/*/*/receipt.json")
        for receipt in receipts:
            made_from = json.loads(receipt.read_text())["teacher_inputs"]
            assert made_from["weights_sha256"] == found["weights_sha256"]


def test_every_case_and_unit_is_there_with_its_digest(built_runs: Path, made: Element) -> None:
    inputs = recorded(built_runs)["inputs"]
    whole = json.loads(made.one("script", id="lineage-json").text)["cases"]
    named = {**inputs["cases"], **inputs["validation"]}
    assert {case: found["digest"] for case, found in whole.items()} == named
    rows = {row[0]: row for row in cells(table_with(made.one(id="lineage"), "First 16"))[1:]}
    assert list(rows) == list(named)
    for case, row in rows.items():
        assert row[2] == named[case][:16]
        if case in inputs["validation"]:
            assert row[5:] == ["not read"] * len(ORGANS)
            assert whole[case]["units"] == {}
            continue
        assert [whole[case]["units"][name][:16] for name in inputs["teachers"]] == row[5:]
        (receipt,) = work_of(built_runs).glob(f"teachers/liver@*/{case}@*/receipt.json")
        assert json.loads(receipt.read_text())["digest"] == whole[case]["units"]["liver"]


def test_verdicts_are_those_of_the_gate(built_runs: Path, made: Element) -> None:
    told = json.loads((work_of(built_runs) / "reports" / "admission.json").read_text())
    rows = cells(table_with(made.one(id="gate"), "Teachers against labels"))[1:]
    assert [(r[0], r[1], r[2], r[5]) for r in rows] == [
        (t["teacher"], t["organ"], t["dataset"], f"{t['dice']:.3f}") for t in told["teachers"]
    ]
    assert {row[9] for row in rows} == {"passed"}


def test_a_teacher_below_a_threshold_is_called_so(runs: Path, tmp_path: Path) -> None:
    change_registry(runs, lambda data: data.update(admission={"dice": 0.99}))
    rows = cells(table_with(page(runs, tmp_path / "r.html").one(id="gate"), "Teachers against"))
    assert {row[9] for row in rows[1:]} == {"below the threshold"}


def test_regions_are_those_of_inspect(built_runs: Path, made: Element, tmp_path: Path) -> None:
    registry = load_registry(built_runs, files=False)
    view = make.read_run(work_of(built_runs), RUN).view
    found = inspect_cohort(registry, work_of(built_runs), view, tmp_path, log=Log(quiet=True))
    expected = {case.case: case for case in found.cases}
    rows = cells(table_with(made.one(id="regions"), "Regions in ml"))[1:]
    inputs = recorded(built_runs)["inputs"]
    assert {row[0] for row in rows} == {*inputs["cases"], *inputs["validation"]}
    for row in rows:
        case = expected[row[0]]
        assert row[2:4] == [make_ml(case.organs[organ].region_ml) for organ in ORGANS]
        assert row[4] == f"{case.agreed_background:.1%}"
        assert row[5] == make_ml(case.conflict_ml)


def test_the_case_in_which_teachers_contradict_each_other_most_is_shown(
    runs: Path, tmp_path: Path, made: Element
) -> None:
    assert "No two teachers claim the same voxel" in made.one(id="conflicts").text
    path = folder_of(runs) / "config.json"
    content = json.loads(path.read_text())
    content["config"]["supervision"]["labels_win"] = False
    path.write_text(json.dumps(content))
    found = page(runs, tmp_path / "r.html")
    conflicts = found.one(id="conflicts")
    rows = {row[0]: row for row in cells(table_with(found.one(id="regions"), "Regions in ml"))[1:]}
    said = [float(row[5]) for row in rows.values()]
    where = sum(ml > 0 for ml in said)
    assert where > 0
    assert f"different organs in {where} of {len(rows)} cases;" in conflicts.text
    assert "All 2 teachers passed the gate" in conflicts.text
    assert float(rows[conflicts.one("h3").text.split()[0]][5]) == max(said)
    assert any("teachers, axial slice" in i.attributes["alt"] for i in conflicts.all("img"))


def make_ml(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def test_scores_made_for_the_page_are_those_that_compare_makes(runs: Path, made: Element) -> None:
    scores = made.one(id="scores")
    assert "predicted for this page" in scores.text
    rows = {row[0]: row for row in cells(scores.all("table")[0])[2:]}
    registry = load_registry(runs, files=False)
    cases = open_cohort(work_of(runs), registry, splits=("validation",)).cases
    settings = ScoringSettings("validation", surface=False)
    found = score_student(folder_of(runs), cases, settings, device="cpu", advance=lambda *_: None)
    for organ in ORGANS:
        dice = [r["Dice"] for r in found if r["organ"] == organ and r["Dice"] is not None]
        assert rows[organ][1] == str(len(dice))
        assert rows[organ][2] == f"{np.mean(dice):.3f}"
        assert rows[organ][5] == f"{min(dice):.3f}"


def test_kept_scores_are_taken_before_the_cache(runs: Path, tmp_path: Path) -> None:
    case = next(iter(recorded(runs)["inputs"]["validation"]))
    row = {"case": case, "organ": "liver", "Dice": 0.123, "NSD": 0.5, "HD95_mm": 7.0}
    path = folder_of(runs) / "scores_validation.json"
    path.write_text(json.dumps({"key": "", "rules": RULES, "rows": [{**row, "reason": ""}]}))
    scores = page(runs, tmp_path / "r.html").one(id="scores")
    assert "scores_validation.json of this run" in scores.text
    assert "0.123" in scores.text
    # Of other cases they are none of this run's, by other rules they mean something else, and what
    # is no row says nothing.
    row["reason"] = ""
    others: list[tuple[int, Any]] = [
        (RULES, [{**row, "case": "a/b"}]), (1, [row]), (RULES, [{"case": case}]), (RULES, 7),
    ]  # fmt: skip
    for other in ({"rules": rules, "rows": rows} for rules, rows in others):
        path.write_text(json.dumps({"key": "", **other}))
        assert "predicted for this page" in page(runs, tmp_path / "r.html").one(id="scores").text


def predictions(folder: Path, registry: Path, reason: str = "") -> Path:
    """Scores of two test cases; the label map of the worse one alone is there, and is its label."""
    nan = math.nan
    scores = {
        case: [OrganScore("liver", nan, nan, nan, 4, 4, reason, overlap, 64)]
        for case, overlap in (("multi-ct/case_001", 3), ("multi-ct/case_002", 1))
    }  # Dice 0.75 and 0.25
    (folder / "multi-ct").mkdir(parents=True)
    labels = registry.parent / "data" / "multi-ct" / "labels"
    shutil.copy(labels / "case_002.nii.gz", folder / "multi-ct")
    summary = summarise(scores, {"liver": 1}) | {"settings": {"tolerance_mm": 2.0}, "failed": {}}
    for row in summary["metric_per_case"]:
        label = labels / f"{row['case'].split('/')[1]}.nii.gz"
        row["reference_sha256"] = file_sha256(label)
        row["prediction_sha256"] = sha256_if_there(folder / f"{row['case']}.nii.gz")
        row["prediction_json_sha256"] = None
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_given_predictions_are_scored_and_shown(built_runs: Path, tmp_path: Path) -> None:
    given = predictions(tmp_path / "predicted", built_runs)
    found = page(built_runs, tmp_path / "r.html", "-p", str(given), "--worst", "1")
    lead = found.one(id="scores").one(class_="lead").text  # the mean of both, and the worse one
    assert lead == "Mean Dice 0.500 . Worst: liver of multi-ct/case_002, 0.250."
    (worst,) = found.one(id="cases").all("article")  # the median of two is the worse
    assert worst.one("h3").text.startswith("multi-ct/case_002 worst case")
    assert "No label map" not in worst.text
    titles = [figure.text.split(",")[0] for figure in worst.one(class_="panels").all("figure")]
    assert titles == ["CT", "reference", "teachers", "student"]
    layers = {
        box.attributes["data-layer"]: box.attributes for box in worst.all("input", type="checkbox")
    }
    assert list(layers) == ["student", "regions", "background", "conflict", "reference"]
    both = page(built_runs, tmp_path / "r.html", "-p", str(given), "--worst", "2")
    _, better = both.one(id="cases").all("article")
    assert "No label map of the student" in better.text
    assert "case_001.nii.gz" in better.text


def test_a_run_by_labels_alone_has_no_teacher_and_says_so(built_runs: Path, tmp_path: Path) -> None:
    found = page(built_runs, tmp_path / "r.html", run="labels/only")
    assert "uses labels alone" in absent(found.one(id="lineage"))
    assert "no gate" in absent(found.one(id="gate"))
    assert "uses no teacher" in absent(found.one(id="regions"))
    assert "learnt from labels alone" in absent(found.one(id="conflicts"))
    titles = [f.text.split(",")[0] for f in found.all(class_="panels")[0].all("figure")]
    assert titles == ["CT", "reference", "student"]
    assert "the run used no teacher" in absent(found.one(id="cases"))
    assert found.one(id="cases").all("img")


def test_an_unfinished_run_without_curves_or_weights_is_told_of(runs: Path, tmp_path: Path) -> None:
    for path in folder_of(runs).iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = page(runs, tmp_path / "r.html")
    assert found.one("h1").text == f"{RUN} not finished"
    assert "No metrics.jsonl" in absent(found.one(id="training"))
    assert "neither student.pt nor best.pt" in absent(found.one(id="scores"))
    assert "there are no scores" in absent(found.one(id="cases"))
    assert not found.all("img")


def test_a_removed_cache_is_told_of_and_kept_scores_stay(runs: Path, tmp_path: Path) -> None:
    inputs = recorded(runs)["inputs"]
    rows = [
        {"case": case, "organ": "liver", "Dice": 0.5, "NSD": None, "HD95_mm": None, "reason": ""}
        for case in inputs["validation"]
    ]
    kept = {"key": "", "rules": RULES, "rows": rows}
    (folder_of(runs) / "scores_validation.json").write_text(json.dumps(kept))
    for name in ("cases", "teachers", "index"):
        shutil.rmtree(work_of(runs) / name)
    found = page(runs, tmp_path / "r.html")
    lineage = found.one(id="lineage")
    assert absent(lineage).count("no longer in the cache") == len(inputs["cases"]) * 3 + len(
        inputs["validation"]
    )
    assert all(digest in lineage.text for digest in inputs["teachers"].values())
    assert "no longer knows this digest" in absent(found.one(id="gate"))
    assert "no longer has any case" in absent(found.one(id="regions"))
    assert "0.500" in found.one(id="scores").text
    assert "No pictures" in absent(found.one(id="cases"))


def test_one_damaged_unit_spoils_its_own_place_alone(runs: Path, tmp_path: Path) -> None:
    unit = next(work_of(runs).glob("teachers/spleen@*/liver-ct/case_001@*"))
    (unit / "receipt.json").unlink()
    found = page(runs, tmp_path / "r.html")
    rows = {row[0]: row for row in cells(table_with(found.one(id="lineage"), "First 16"))[1:]}
    assert [case for case, row in rows.items() if len(row[6]) != 16 and row[6] != "not read"] == [
        "liver-ct/case_001"
    ]
    measured = cells(table_with(found.one(id="regions"), "Regions in ml"))[1:]
    assert len(measured) == len(rows)


def test_a_registry_that_changed_since_changes_no_lineage(
    runs: Path, tmp_path: Path, made: Element
) -> None:
    def change(data: dict[str, Any]) -> None:
        del data["teachers"]["spleen"]
        data["grid"]["spacing_mm"] = [11.0, 11.0, 11.0]

    change_registry(runs, change)
    found = page(runs, tmp_path / "r.html")
    assert found.one("script", id="lineage-json").text == made.one("script", id="lineage-json").text
    assert "not in the registry" in found.one(id="lineage").text
    assert "no longer has this teacher" in absent(found.one(id="gate"))


def test_the_same_run_gives_the_same_bytes(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make.time, "strftime", lambda *_: "2026-01-02T03:04:05Z")
    result = call(runs, None)
    assert result.exit_code == 0, result.output
    first = folder_of(runs) / "report.html"
    assert result.stdout == f"{first}\n"
    text = first.read_bytes()
    assert text.count(b"2026-01-02T03:04:05Z") == 2
    # The page of before is no part of the run, and workers change speed alone.
    again = tmp_path / "again.html"
    page(runs, again, "--workers", "1")
    assert again.read_bytes() == text


def test_what_files_say_is_escaped(runs: Path, tmp_path: Path) -> None:
    change_registry(runs, lambda data: data["teachers"]["liver"].update(source=HOSTILE))
    path = folder_of(runs) / "config.json"
    content = json.loads(path.read_text())
    content["config"]["note"] = HOSTILE
    path.write_text(json.dumps(content))
    given = predictions(tmp_path / "predicted", runs, reason=HOSTILE)
    found = page(runs, tmp_path / "r.html", "-p", str(given))
    assert not [e for e in found.all("img") if not e.attributes["src"].startswith("data:")]
    assert len(found.all("script")) == 2
    assert HOSTILE in found.one(id="lineage").text
    assert HOSTILE in found.one(id="cases").text
    assert "finished.json names another digest" in found.one("header").text


def test_without_regions_no_unit_is_read_for_them(built_runs: Path, tmp_path: Path) -> None:
    found = page(built_runs, tmp_path / "r.html", "--no-regions")
    assert "--no-regions" in absent(found.one(id="regions"))


def test_tables_and_pictures_can_be_heard(made: Element) -> None:
    assert made.one("html").attributes["lang"] == "en"
    assert made.one("head").one("title").text == f"Run {RUN}: report"
    for table in made.all("table"):
        assert table.one("caption").text
        assert all(th.attributes.get("scope") for th in table.all("th"))
    for picture in made.all(role="img"):
        assert picture.attributes.get("aria-label") or picture.attributes.get("aria-labelledby")
    for control in made.all("input"):
        in_label = control.parent is not None and control.parent.tag == "label"
        assert in_label or control.attributes["aria-label"]


def test_an_unknown_run_names_those_there_are(built_runs: Path, tmp_path: Path) -> None:
    error = error_of(built_runs, tmp_path / "r.html", run="labels")
    assert isinstance(error, ConfigError)
    assert error.exit_code == 2
    assert error.fix == f"Runs here: labels/only, {RUN}."
    assert isinstance(error_of(built_runs, tmp_path / "r.html", run="../cases"), ConfigError)


def test_a_run_may_be_given_by_its_folder(
    built_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `export` and `evaluate` take it."""
    monkeypatch.chdir(work_of(built_runs).parent)
    for run in ("labels/only", RUN):
        for path in (folder_of(built_runs, run), f"{work_of(built_runs).name}/students/{run}/"):
            found = page(built_runs, tmp_path / "r.html", "--no-regions", run=str(path))
            assert found.one("head").one("title").text == f"Run {run}: report"


def test_a_record_that_cannot_be_read_stops(runs: Path, tmp_path: Path) -> None:
    (folder_of(runs) / "config.json").write_text("{")
    error = error_of(runs, tmp_path / "r.html")
    assert isinstance(error, CheckpointError)
    assert "config.json" in str(error.where)


def test_a_page_of_others_stays(built_runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "index.html"
    output.write_text("<html>a home page</html>")
    # It is asked for before the scores, which are not there.
    error = call(built_runs, output, "--no-regions", "-p", str(tmp_path)).exception
    assert isinstance(error, ConfigError)
    assert str(error) == (
        f"{output}: `pipeline report` did not write this file and does not replace it. Name "
        "another file with --output."
    )
    assert output.read_text() == "<html>a home page</html>"
    output.unlink()
    for _ in range(2):
        page(built_runs, output, "--no-regions")


def test_predictions_without_scores_stop(built_runs: Path, tmp_path: Path) -> None:
    error = error_of(built_runs, tmp_path / "r.html", "-p", str(tmp_path))
    assert isinstance(error, ConfigError)
    assert "pipeline evaluate" in error.fix
    given = predictions(tmp_path / "predicted", built_runs)
    summary = given / "summary.json"
    summary.write_text(summary.read_text().replace(f'"rules": {RULES}', '"rules": 2'))
    error = error_of(built_runs, tmp_path / "r.html", "-p", str(given))
    assert isinstance(error, ConfigError)
    assert "scored by an earlier version" in error.what


@pytest.mark.parametrize("what", ["prediction", "JSON beside", "reference", "image"])
def test_scores_of_other_files_than_are_there_stop(runs: Path, tmp_path: Path, what: str) -> None:
    """After another student predicted, or a label was corrected, and nobody evaluated again."""
    given = predictions(tmp_path / "predicted", runs)
    case, data = "multi-ct/case_002", runs.parent / "data" / "multi-ct"
    image = data / "images" / "case_002.nii.gz"
    summary = json.loads((given / "summary.json").read_text())
    summary["metric_per_case"][1] |= {"image_sha256": file_sha256(image)}
    (given / "summary.json").write_text(json.dumps(summary))
    page(runs, tmp_path / "before.html", "-p", str(given), "--no-regions")
    changed = {
        "prediction": given / f"{case}.nii.gz",
        "JSON beside": given / f"{case}.json",
        "reference": data / "labels" / "case_002.nii.gz",
        "image": image,
    }[what]
    with changed.open("ab") as file:
        file.write(b"newer")
    error = error_of(runs, tmp_path / "r.html", "-p", str(given))
    of = f"{what} {case}" if what == "JSON beside" else f"{what} of {case}"
    assert str(error) == (
        f"{given / 'summary.json'}: the scores are out of date: the {of} has changed since it was "
        f"evaluated. Run `pipeline evaluate {given}` again."
    )


def test_predictions_of_others_are_told(built_runs: Path, tmp_path: Path) -> None:
    """Of several students as `evaluate` says it, and of another one than the run's."""
    given = predictions(tmp_path / "predicted", built_runs)
    summary = json.loads((given / "summary.json").read_text())
    summary["warnings"] = ["by several students."]
    own = file_sha256(folder_of(built_runs) / "student.pt")
    for row, student in zip(summary["metric_per_case"], (own, "0" * 64), strict=True):
        row["student_sha256"] = student
    (given / "summary.json").write_text(json.dumps(summary))
    found = page(built_runs, tmp_path / "r.html", "-p", str(given), "--no-regions")
    text = found.one(id="scores").text
    assert "by several students." in text
    other = "1 of 2 predictions are by another student than this run's: multi-ct/case_002."
    assert other in text


def test_only_an_html_file_is_written(built_runs: Path, tmp_path: Path) -> None:
    assert isinstance(error_of(built_runs, tmp_path / "report.txt"), ConfigError)
    blocked = tmp_path / "file"
    blocked.write_text("")
    error = error_of(built_runs, blocked / "r.html", "-p", str(tmp_path))
    assert isinstance(error, WorkFolderError)
    assert f"a file is in the way, {blocked}" in error.what


def test_a_run_in_an_object_store_keeps_its_page_there(
    built_runs: Path, store_work: UPath, tmp_path: Path
) -> None:
    store_work.fs.put(str(work_of(built_runs)), store_work.path, recursive=True)
    arguments = ["report", RUN, "-r", str(built_runs), "-w", str(store_work), "-q"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, (result.output, result.exception)
    path = store_work / "students" / RUN / "report.html"
    assert result.stdout == f"{path}\n"
    found = parse(path.read_text(encoding="utf-8"))
    assert tuple(s.attributes["id"] for s in found.all("section")) == SECTIONS
    assert found.one(id="cases").all("img")
