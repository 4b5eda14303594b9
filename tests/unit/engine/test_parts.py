from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.parts import GATE, Part, chosen_part, share
from pipeline.errors import ConfigError


def array(task: int, first: int, count: int, step: int = 1) -> dict[str, str]:
    """What Slurm tells an element of an array."""
    names = ("ID", "MIN", "COUNT", "STEP")
    values = (task, first, count, step)
    return {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(names, values, strict=True)}


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4), st.floats(1, 100), max_size=30),
    st.integers(1, 8),
)
def test_each_thing_is_in_one_part_and_no_part_is_much_dearer(
    costs: dict[str, float], num_parts: int
) -> None:
    parts = share(costs, num_parts)
    assert sorted(name for part in parts for name in part) == sorted(costs)
    assert [set(p) for p in parts] == [
        set(p) for p in share(dict(reversed(costs.items())), num_parts)
    ]
    if costs:
        loads = [sum(costs[name] for name in part) for part in parts]
        assert max(loads) <= sum(loads) / num_parts + max(costs.values()) + 1e-9


def test_large_cases_do_not_meet_in_one_part() -> None:
    costs = {"a": 9.0, "b": 8.0, "c": 1.0, "d": 1.0, "e": 1.0, "f": 2.0}
    assert share(costs, 2) == [["a", "c", "d"], ["b", "e", "f"]]


@pytest.mark.parametrize(
    ("num_parts", "part_id", "environment", "expected"),
    [
        (None, None, array(3, 0, 16), None),  # an array of something else
        (4, 2, {}, Part(2, 4)),
        (16, 7, array(7, 3, 2), Part(7, 16)),  # --array=3,7 again
        (16, None, array(3, 0, 16), Part(3, 16)),
        (16, None, array(16, 1, 16), Part(15, 16)),  # --array=1-16
        (3, None, array(8, 2, 3, 3), Part(2, 3)),  # --array=2-8:3
        (1, 0, {}, None),  # one part is all
    ],
)
def test_the_part_of_a_job(
    num_parts: int | None,
    part_id: int | None,
    environment: Mapping[str, str],
    expected: Part | None,
) -> None:
    assert chosen_part(num_parts, part_id, environment) == expected


@pytest.mark.parametrize(
    ("num_parts", "part_id", "environment", "why"),
    [
        (None, 2, {}, "without --num-parts"),
        (4, None, {}, "no Slurm array"),
        (4, 4, {}, "0 to 3"),
        (16, None, array(3, 3, 2), "has 2 elements"),
        (2, None, array(7, 3, 2), "none of 2 in a row"),  # --array=3,7
    ],
)
def test_what_does_not_say_which_part_is_refused(
    num_parts: int | None, part_id: int | None, environment: Mapping[str, str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        chosen_part(num_parts, part_id, environment)
    assert "--part-id" in caught.value.fix


def test_the_gate_is_no_part() -> None:
    assert chosen_part(None, None, array(3, 0, 16), gate_only=True) == GATE
    with pytest.raises(ConfigError, match="--gate-only with --num-parts"):
        chosen_part(4, 0, {}, gate_only=True)
