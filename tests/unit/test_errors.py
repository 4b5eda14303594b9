from __future__ import annotations

import pickle

import pytest

from pipeline.errors import CacheCorrupt, ConfigError, PipelineError, counted, listed, named


@pytest.mark.parametrize(
    "error",
    [
        PipelineError("it broke."),
        ConfigError("unknown key.", where="a.yaml:3", fix="Remove it."),
        CacheCorrupt("other bytes.", where="unit.zarr"),
    ],
)
def test_an_error_of_a_worker_process_arrives_whole(error: PipelineError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert (arrived.what, arrived.where, arrived.fix) == (error.what, error.where, error.fix)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, "teacher liver"),
        ("teachers/a.pt", "teacher liver, teachers/a.pt"),
        ("teacher liver, teachers/a.pt", "teacher liver, teachers/a.pt"),
    ],
)
def test_a_place_is_named_once(where: str | None, expected: str) -> None:
    with pytest.raises(ConfigError) as caught, named("teacher liver"):
        raise ConfigError("it broke.", where=where, fix="Mend it.")
    assert str(caught.value) == f"{expected}: it broke. Mend it."
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_counts_and_lists_of_names() -> None:
    assert [counted(n, "unit") for n in (0, 1, 2)] == ["0 units", "1 unit", "2 units"]
    assert listed([]) == ""
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert listed(["a", "b", "c"], 2, "; ") == "a; b; and 1 more"
    assert listed(["a", "b", "c"], 2, "\n  ") == "a\n  b\n  and 1 more"
