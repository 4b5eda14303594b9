"""What a digest depends on, and what it does not: each input alone, and each way to write it."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache import schema
from pipeline.cache.cases import identify_case
from pipeline.cache.schema import StorageConfig, differing, unit_inputs
from pipeline.config import digest
from pipeline.data.patches import WindowConfig
from pipeline.data.registry import Registry, load_registry
from pipeline.engine.here import Execution, Here
from pipeline.networks.by_name import NetworkConfig
from pipeline.student.settings import TrainingConfig, run_digest
from pipeline.student.speed import TrainingExecution
from pipeline.teachers.load import Teachers
from stages import cache_teachers, train_student
from tests.stages.stage_contract import content
from tests.tiny import (
    GRID_MM,
    NETWORK,
    ORGANS,
    WINDOW,
    cache_config,
    case_digested,
    change_registry,
    copy_cohort,
    repaint,
    run_cache,
    run_python,
    teacher_digested,
    work_of,
    write_teacher,
)

# --- one value, one digest ------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1e300, 5e-324]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=6))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
trees = st.dictionaries(st.text(min_size=1, max_size=4), values, min_size=1, max_size=5)


def otherwise(value: Any, draw: st.DrawFn) -> Any:
    """The same value, as another program or another YAML file may hand it over."""
    if isinstance(value, dict):
        items = draw(st.permutations(list(value.items())))
        return {key: otherwise(v, draw) for key, v in items}
    if isinstance(value, list):
        parts = [otherwise(v, draw) for v in value]
        return draw(st.sampled_from([list, tuple]))(parts)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if value == int(value) and abs(value) < 2**53:
        kinds: list[Callable[[Any], Any]] = [int, float, lambda v: np.float64(v)]
        return draw(st.sampled_from(kinds))(value)
    return value


def tagged(value: Any) -> Any:
    """An independent normal form: equal if, and only if, two values are one setting."""
    if isinstance(value, dict):
        return ("map", frozenset((key, tagged(v)) for key, v in value.items()))
    if isinstance(value, list):
        return ("list", tuple(tagged(v) for v in value))
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return (type(value).__name__, value)
    return ("number", value)


@st.composite
def one_written_twice(draw: st.DrawFn) -> tuple[Any, Any]:
    value = draw(trees)
    return value, otherwise(value, draw)


@given(one_written_twice())
def test_order_and_types_of_the_writer_do_not_matter(pair: tuple[Any, Any]) -> None:
    assert digest(pair[0]) == digest(pair[1])
    assert differing(*pair) == []


@given(trees, trees)
def test_two_digests_are_equal_only_for_one_value(a: Any, b: Any) -> None:
    assert (digest(a) == digest(b)) == (tagged(a) == tagged(b))


@st.composite
def one_leaf_changed(draw: st.DrawFn) -> tuple[Any, Any]:
    """A tree and the same with one value, however deep, replaced, added or left out."""
    tree = draw(trees)
    changed: Any = json.loads(json.dumps(tree))
    here = changed
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = draw(st.sampled_from(keys))
        below = here[key]
        if not isinstance(below, (dict, list)) or not below or draw(st.booleans()):
            break
        here = below
    if draw(st.booleans()):
        del here[key]
    else:
        here[key] = draw(leaves.filter(lambda new: tagged(new) != tagged(below)))
    return tree, changed


@given(one_leaf_changed())
def test_one_changed_leaf_is_another_digest_and_is_named(pair: tuple[Any, Any]) -> None:
    assert digest(pair[0]) != digest(pair[1])
    (line,) = differing(*pair)
    key = line.split(":")[0].split(".")[0]
    assert any(name.startswith(key) for name in {**pair[0], **pair[1]})
    assert len(differing(pair[1], pair[0])) == 1


def test_no_number_is_a_digest() -> None:
    for bad in (float("nan"), float("inf"), {"a": [float("-inf")]}):
        with pytest.raises(ValueError, match="JSON compliant"):
            digest(bad)


PROGRAM = """
import json, sys
from pipeline.cache.schema import case_inputs, teacher_inputs, unit_inputs
from pipeline.cache.schema import StorageConfig
from pipeline.config import digest
from pipeline.data.entries import DatasetEntry, TeacherEntry
organs = {"spleen", "liver", "pancreas", "kidney-left", "kidney-right", "aorta"}
values = {organ: (1, 2) for organ in organs}
dataset = DatasetEntry.model_construct(annotated=values, ignore_values={9, 1234, 77},
    background_values=(3,))
case = case_inputs(dataset, {organ: len(organ) for organ in organs}, ("a", "b"),
    spacing_mm=(1.5, 1, 1.0), storage=StorageConfig())
entry = TeacherEntry.model_construct(organs=values, activation="softmax")
teacher = teacher_inputs(entry, {organ: {"taps": organs, "\\u00e4": 0.1} for organ in organs},
    weights_sha256="w", spacing_mm=(1.5, 1.0, 1), storage=StorageConfig())
print(json.dumps([digest(case), digest(teacher),
    digest(unit_inputs(teacher_digest="t", image_sha256="i"))]))
"""


def test_every_process_computes_the_same_digests() -> None:
    found = set()
    for seed in ("0", "random"):
        found.add(run_python("-c", PROGRAM, PYTHONHASHSEED=seed).stdout)
    assert len(found) == 1
    # Pinned: a digest that changes without a new FORMAT_VERSION would make every cache stale.
    assert json.loads(found.pop()) == PINNED


PINNED = [
    "e84ab481c226d13fc3712878c63621bf7604620f4037da38f757c9c2daaf6580",
    "c15736aa27cf35a2b167f6f2d9ad042374dd06fe9dea2c3e0f75d02d62f3c2c0",
    "3ced29d28a0162a5ba26045849b18a718b7efd76d3edb8c57ed4078b2b1d80a9",
]

# --- each input of the three kinds of inputs ------------------------------------------------------

CASE: dict[str, Any] = {
    "image_sha256": "a",
    "label_sha256": "b",
    "annotated": {"liver": (1,), "spleen": (2, 3)},
    "ids": {"liver": 1, "spleen": 2},
    "ignore_values": (9,),
    "background_values": (8,),
    "spacing_mm": (3.0, 2.0, 2.0),
    "storage": StorageConfig(),
    "units": "hu",
}
TEACHER: dict[str, Any] = {
    "weights_sha256": "w",
    "description": {"kind": "checkpoint", "taps": {"a": [2, 2, 2]}},
    "organs": {"liver": (1,)},
    "activation": "softmax",
    "spacing_mm": (3.0, 2.0, 2.0),
    "storage": StorageConfig(),
    "outputs": "logits",
}
UNIT: dict[str, Any] = {"teacher_digest": "t", "image_sha256": "i"}


OF_BOTH = {"entry", "spacing_mm", "storage"}


@pytest.mark.parametrize(
    ("inputs", "given_"), [(case_digested, CASE), (teacher_digested, TEACHER), (unit_inputs, UNIT)]
)
def test_no_argument_is_forgotten(inputs: Callable[..., Any], given_: dict[str, Any]) -> None:
    """Also not one that is added to these functions later: it must be listed here, and matter."""
    for function, names in {
        schema.case_inputs: {*OF_BOTH, "ids", "hashes"},
        schema.teacher_inputs: {*OF_BOTH, "description", "weights_sha256"},
        unit_inputs: {*UNIT},
    }.items():
        assert set(inspect.signature(function).parameters) == names
    before = digest(inputs(**given_))
    for name, value in given_.items():
        assert digest(inputs(**{**given_, name: other(value)})) != before, name


def other(value: Any) -> Any:
    match value:
        case str():
            return value + "x"
        case StorageConfig():
            return StorageConfig(chunk=32)
        case Mapping():
            first = next(iter(value))
            return {**value, first: other(value[first])}
        case tuple() | list():
            return (*value[:-1], other(value[-1]))
        case _:
            return value + 1


OTHER_VALUES: dict[type, dict[str, Any]] = {
    StorageConfig: {"chunk": 32, "log_odds_bits": 4, "feature_bits": 4, "zstd_level": 2},
    WindowConfig: {
        "shape": (16, 16, 24),
        "overlap": 0.5,
        "sigma": 0.25,
        "precision": "bfloat16",
        "mirror": ("x",),
    },
}


@pytest.mark.parametrize("model", list(OTHER_VALUES))
def test_no_setting_is_forgotten(model: type[StorageConfig | WindowConfig]) -> None:
    """Every field of the settings that change numbers has another value to try below."""
    assert set(model.model_fields) == set(OTHER_VALUES[model])


# --- the real thing: files, registry, settings ----------------------------------------------------


@pytest.fixture(scope="module")
def cohort(built_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_cohort(built_cohort, tmp_path_factory.mktemp("provenance") / "cohort")


def digests(
    registry: Registry,
    *,
    window: WindowConfig | None = None,
    storage: StorageConfig | None = None,
    device: str = "cpu",
    window_batch: int = 1,
) -> tuple[str, str]:
    """Of the case multi-ct/case_000 and of the teacher liver, as stage one computes them."""
    storage = storage or StorageConfig()
    source = registry.cases("multi-ct")[0]
    spacing = registry.grid.spacing_mm
    case, _ = identify_case(registry, source, spacing_mm=spacing, storage=storage)
    window = window or WindowConfig(shape=WINDOW, overlap=0.25)
    teacher = Teachers(registry, window, storage, device, window_batch).open("liver")
    return case.digest, teacher.indexed.digest


def changed(cohort: Path, tmp_path: Path, change: Callable[[Path], object]) -> tuple[bool, bool]:
    """Whether a change to a copy of the cohort changed the case's digest, and the teacher's."""
    copy = copy_cohort(cohort, tmp_path / "changed")
    before = digests(load_registry(copy))
    change(copy)
    after = digests(load_registry(copy))
    return before[0] != after[0], before[1] != after[1]


def repainted(kind: str) -> Callable[[Path], None]:
    return lambda r: repaint(r.parent / "data" / "multi-ct" / kind / "case_000.nii.gz")


def weights(**changes: Any) -> Callable[[Path], None]:
    def change(registry: Path) -> None:
        values = {"seed": 0, **changes}
        write_teacher(registry.parent / "teachers" / "liver.pt", "liver", **values)

    return change


def entry(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda registry: change_registry(registry, change)


def wider(registry: Path) -> None:
    args = {**NETWORK.args, "norm": "batch"}
    weights(network=NetworkConfig(name="UNet", args=args))(registry)


def swap_ids(data: dict[str, Any]) -> None:
    data["organs"] = {"liver": 2, "spleen": 1}


def new_spacing(data: dict[str, Any]) -> None:
    data["grid"]["spacing_mm"] = [12.0, 12.0, 10.0]


CHANGES: dict[str, tuple[Callable[[Path], object], bool, bool]] = {
    "image bytes": (repainted("images"), True, False),
    "label bytes": (repainted("labels"), True, False),
    "label values": (
        entry(lambda d: d["datasets"]["multi-ct"]["annotated"].update(liver=[1, 3])), True, False,
    ),
    "ignored values": (
        entry(lambda d: d["datasets"]["multi-ct"].update(ignore_values=[9])), True, False,
    ),
    "background values": (
        entry(lambda d: d["datasets"]["multi-ct"].update(background_values=[9])), True, False,
    ),
    "units": (entry(lambda d: d["datasets"]["multi-ct"].update(units="other")), True, False),
    "organ ids": (entry(swap_ids), True, False),
    "grid": (entry(new_spacing), True, True),
    "weights": (weights(seed=5), False, True),
    "architecture": (wider, False, True),
    "spacing of the teacher": (weights(spacing_mm=(12.0, 12.0, 11.0)), False, True),
    "taps": (entry(lambda d: d["teachers"]["liver"].update(taps=[])), False, True),
    "activation": (
        entry(lambda d: d["teachers"]["liver"].update(activation="sigmoid")), False, True,
    ),
}  # fmt: skip
SAME: dict[str, Callable[[Path], object]] = {
    "nothing": lambda registry: None,
    "licence and source": entry(
        lambda d: [d["teachers"]["liver"].update(licence="x"),
                   d["datasets"]["multi-ct"].update(source="y")]
    ),
    "what the gate asks": entry(
        lambda d: [d.update(admission={"dice": 0.4, "cases": 1}),
                   d["teachers"]["liver"].update(admission={"dice": 0.7})]
    ),
    "another dataset": entry(lambda d: d["datasets"]["liver-ct"].update(ignore_values=[9])),
    "another teacher": entry(lambda d: d["teachers"].pop("spleen")),
    "the split": entry(
        lambda d: d["datasets"]["multi-ct"].update(
            split={"train": ["case_000"], "validation": [], "test": []}
        )
    ),
    "order in the file": entry(
        lambda d: [d.update(organs=dict(reversed(d["organs"].items()))),
                   d.update(teachers=dict(reversed(d["teachers"].items())))]
    ),
    "where the weights are": lambda registry: [
        shutil.move(registry.parent / "teachers" / "liver.pt", registry.parent / "moved.pt"),
        change_registry(registry, lambda d: d["teachers"]["liver"].update(weights="moved.pt")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", list(CHANGES))
def test_each_input_alone_changes_the_digests_that_depend_on_it(
    cohort: Path, tmp_path: Path, what: str
) -> None:
    change, case, teacher = CHANGES[what]
    assert changed(cohort, tmp_path, change) == (case, teacher)


@pytest.mark.parametrize("what", list(SAME))
def test_what_changes_no_number_changes_no_digest(cohort: Path, tmp_path: Path, what: str) -> None:
    assert changed(cohort, tmp_path, SAME[what]) == (False, False)


@pytest.mark.parametrize("field", list(OTHER_VALUES[StorageConfig]))
def test_each_storage_setting_is_in_both_digests(cohort: Path, field: str) -> None:
    registry = load_registry(cohort)
    storage = StorageConfig(**{field: OTHER_VALUES[StorageConfig][field]})
    for before, after in zip(digests(registry), digests(registry, storage=storage), strict=True):
        assert before != after


@pytest.mark.parametrize("field", list(OTHER_VALUES[WindowConfig]))
def test_each_window_setting_is_in_the_teachers_digest(cohort: Path, field: str) -> None:
    registry = load_registry(cohort)
    window = {"shape": WINDOW, "overlap": 0.25, field: OTHER_VALUES[WindowConfig][field]}
    before, after = digests(registry), digests(registry, window=WindowConfig(**window))
    assert before[0] == after[0]
    assert before[1] != after[1]


# --- speed ----------------------------------------------------------------------------------------

OF_THE_RUN = {
    "config", "registry", "work", "log", "scope", "execution", "dry_run", "tables", "force",
    "accept", "part", "allow_missing", "loggers",
}  # fmt: skip
# Where it is done: tests/faults/test_executors.py compares the bytes. How fast: `SpeedFlags` says
# that rounding changes, and tests/unit/student/test_speed.py how little.
ELSEWHERE = {"engine", "flags"}


def test_a_stages_flags_are_its_settings_or_speed() -> None:
    """A new flag must be tried below, or be one that says what is done and not how."""
    caching = set(inspect.signature(cache_teachers.run).parameters)
    caching |= {f.name for kind in (Execution, Here) for f in fields(kind) if f.init}
    assert caching - OF_THE_RUN - ELSEWHERE == {"device", "window_batch", "overlap"}
    assert set(inspect.signature(train_student.run).parameters) <= OF_THE_RUN
    execution = {field.name for field in fields(TrainingExecution)}
    training = execution - OF_THE_RUN - ELSEWHERE
    assert training == {"device", "workers", "checkpoint_minutes", "stage_to", "pool_bytes"}
    # A run's digest is of the configuration and of the digests of what it reads.
    assert set(inspect.signature(run_digest).parameters) == {"config", "inputs"}
    assert execution.isdisjoint(TrainingConfig.model_fields)


@pytest.mark.parametrize("speed", [{"window_batch": 7}, {"device": "auto"}, {"device": "cpu"}])
def test_speed_is_in_no_digest(cohort: Path, speed: dict[str, Any]) -> None:
    registry = load_registry(cohort)
    assert digests(registry, **speed) == digests(registry)


def test_a_run_with_other_flags_reuses_every_unit(tiny_cached: Path) -> None:
    from pipeline.log import Log

    before = content(work_of(tiny_cached), without=["reports/*"])
    report = run_cache(
        cache_config(),
        load_registry(tiny_cached),
        work_of(tiny_cached),
        log=Log(quiet=True),
        device="auto",
        window_batch=3,
        tables=False,
    )
    assert (report.done, len(report.skipped), report.failed) == ([], 27, {})
    assert content(work_of(tiny_cached), without=["reports/*"]) == before
    assert len(ORGANS) * 9 + 9 == len(report.skipped)
    assert load_registry(tiny_cached).grid.spacing_mm == GRID_MM
