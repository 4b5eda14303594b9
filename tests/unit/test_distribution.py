from __future__ import annotations

from pathlib import Path

from tests.distribution import LONG_FIRST, TOGETHER, piece, rank

ROOT = Path(__file__).parents[2]


def test_what_takes_long_comes_first_and_some_folders_are_one_piece() -> None:
    assert all((ROOT / folder).is_dir() for folder in (*LONG_FIRST, *TOGETHER))
    nodeids = ["tests/unit/test_a.py::b", "tests/faults/test_c.py::d", "tests/slurm/test_e.py::f"]
    assert sorted(nodeids, key=rank) == nodeids[::-1]
    assert [piece(nodeid) for nodeid in (*nodeids, "tests/slurm/test_g.py::H::i")] == [
        "tests/unit/test_a.py", "tests/faults/", "tests/slurm/", "tests/slurm/",
    ]  # fmt: skip


def test_who_shares_the_models_of_nnunet_is_one_piece() -> None:
    sharing = [p for p in (ROOT / "tests").rglob("test_*.py") if "nnunet_models" in p.read_text()]
    sharing.remove(Path(__file__))
    assert len(sharing) == 4
    nodeids = [f"{path.relative_to(ROOT).as_posix()}::b" for path in sharing]
    assert {piece(nodeid) for nodeid in nodeids} == {"nnU-Net"}
    assert piece("tests/unit/teachers/test_nnunet_folder.py::b") != "nnU-Net"
