"""Where the real CT and the pre-trained weights lie, for tests that want them.

They are not part of this repository. They are looked for in the folder that the environment
variable ORGAN_DISTILL_SHARED names, else in `shared/data` beside the checkout; the folder holds
`real_ct/` and `teacher_weights/`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_VARIABLE = "ORGAN_DISTILL_SHARED"
_PARTS = ("real_ct", "teacher_weights")


def shared_data_dir() -> Path | None:
    """The folder with `real_ct/` and `teacher_weights/`, or None where it is absent."""
    folder = _candidate()
    return folder if all((folder / part).is_dir() for part in _PARTS) else None


def _candidate() -> Path:
    named = os.environ.get(_VARIABLE)
    return Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"


needs_shared_data = pytest.mark.skipif(
    shared_data_dir() is None,
    reason=(
        f"no real CT and weights: looked for {' and '.join(_PARTS)} in {_candidate()} "
        f"({_VARIABLE} names another folder)"
    ),
)
