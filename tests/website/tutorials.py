"""What of the pages that lead from the first command to the last is typed otherwise, and why.

Like `tests/website/changes.py`, which has the other pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.website.changes import INSTALLED, SMALL, STEPS
from tests.website.reader import Change

TUTORIALS: Mapping[str, Sequence[Change]] = {
    "quickstart.md": (
        Change("make demo", "", "it makes .venv, and takes minutes; --quick goes the same road"),
        Change(". .venv/bin/activate", "", INSTALLED),
    ),
    "from-nnunet.md": (Change("plan --student\n", "plan --student -o proposed.yaml\n", SMALL),),
    "README.md": (
        Change("make demo ", "# ", "it makes .venv, and takes minutes; see quickstart.md"),
        Change("make test ", "# ", "that is this"),
        Change(
            "# writes data_registry.yaml; read it, choose test cases",
            "\nsed -i 's/test: 0.0/test: 0.2/' data_registry.yaml",
            "what the comment asks for",
        ),
        Change(
            "pipeline train-student  -r", "pipeline train-student -c train_student.yaml -r", STEPS
        ),
        Change("plan --student -r", "plan --student -o proposed.yaml -r", SMALL),
        Change("--seeds 0,1,2", "--seeds 0,1", "each seed takes seconds"),
    ),
}
