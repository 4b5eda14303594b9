from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import Intensity
from pipeline.data.patches import WindowConfig
from pipeline.data.volume import Grid, Volume
from pipeline.errors import TeacherError
from pipeline.networks.by_name import build_network
from pipeline.networks.tensor_file import save_atomically
from pipeline.student.checkpoint import StudentRecord, load_student, save_student
from pipeline.teachers.checkpoint import CheckpointTeacher, read_teacher, save_teacher
from pipeline.teachers.teacher import StreamingTeacher
from tests.tiny import GRID_MM, NETWORK, TAP, teacher_data, write_teacher
from tests.unit.teachers.teacher_contract import StoredNetworkContract, opened, refusal

WINDOW = WindowConfig(shape=(8, 8, 8), overlap=0.25)


def entry(**changes: Any) -> TeacherEntry:
    return TeacherEntry.model_validate(teacher_data("liver", **changes))


def load(path: Path, window: WindowConfig = WINDOW, **changes: Any) -> CheckpointTeacher:
    entered = entry(**changes)
    return opened(CheckpointTeacher, entered, path, name="liver", window=window, batch=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_teacher(tmp_path / "liver.pt", "liver", seed=0)
    return tmp_path / "liver.pt"


def refused(path: Path, match: str, **changes: Any) -> str:
    return refusal(match, str(path), lambda: load(path, **changes))


class TestCheckpoint(StoredNetworkContract):
    organs: ClassVar = {"liver": 1}
    num_channels = 2
    spacing_mm = GRID_MM
    tap = TAP
    no_weights = "not a plain tensor file"
    numbers = (
        {"window": WindowConfig(shape=(8, 8, 12), overlap=0.25)},
        {"window": WindowConfig(shape=(8, 12, 16), overlap=0.5)},
        {"window": WindowConfig(shape=(8, 12, 16), overlap=0.25, sigma=0.3)},
        {"taps": []},
    )

    def entry(self, **changes: Any) -> TeacherEntry:
        return entry(**changes)

    def put_nan(self, path: Path) -> None:
        record, state = read_teacher(path)
        next(iter(state.values())).view(-1)[0] = float("nan")
        save_teacher(path, record, state)

    def test_slab_by_slab_is_the_whole(self, path: Path) -> None:
        teacher, image = self.load(path, taps=self.taps()), self.image()
        assert isinstance(teacher, StreamingTeacher)
        whole = teacher.predict(image)
        slabs: list[Any] = []
        cells: dict[str, list[Any]] = {tap: [] for tap in self.taps()}
        teacher.stream(
            image, logits=slabs.append, features={tap: cells[tap].append for tap in cells}
        )
        assert len(slabs) > 1
        np.testing.assert_array_equal(np.concatenate(slabs, axis=1), whole.logits.array)
        for tap, feature in whole.features.items():
            np.testing.assert_array_equal(np.concatenate(cells[tap], axis=1), feature.array)


def test_round_trip(path: Path) -> None:
    record, state = read_teacher(path)
    assert record.network == NETWORK
    assert record.channels == {"liver": (1,)}
    assert record.spacing_mm == GRID_MM
    assert record.intensity == Intensity()
    save_teacher(path.with_name("again.pt"), record, state)
    record_again, state_again = read_teacher(path.with_name("again.pt"))
    assert record_again == record
    assert set(state_again) == set(state)
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert sorted(p.name for p in path.parent.iterdir()) == ["again.pt", "liver.pt"]


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "as before files were sealed"])
def test_a_flipped_bit_in_its_weights_is_found(path: Path, sealed: bool) -> None:
    record, state = read_teacher(path)
    if not sealed:
        torch.save({"record": record.model_dump_json(), "state": state}, path)
        assert read_teacher(path)[0] == record
    intact = path.read_bytes()
    largest = max(state.values(), key=lambda tensor: tensor.numel())
    changed = bytearray(intact)
    changed[intact.index(largest.numpy().tobytes()) + 1] ^= 16
    path.write_bytes(changed)
    message = refused(path, "its bytes are not those that were written")
    assert "Train or fetch it again" in message


@pytest.mark.parametrize(
    "content",
    [{"weight": torch.zeros(3)}, torch.zeros(3), [1], {"record": "{}", "state": {}}, {"record": 1}],
)
def test_a_tensor_file_from_elsewhere(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "liver.pt")
    message = refused(tmp_path / "liver.pt", "not one that `pipeline train-teachers` wrote")
    assert "factory" in message


@pytest.mark.parametrize("damage", ["shape", "missing", "extra"])
def test_weights_that_do_not_fit_the_network(path: Path, damage: str) -> None:
    record, state = read_teacher(path)
    name = next(iter(state))
    if damage == "shape":
        state[name] = torch.zeros(1, 2, 3)
    elif damage == "missing":
        del state[name]
    else:
        state["extra.weight"] = torch.zeros(1)
    save_teacher(path, record, state)
    refused(path, "do not fit the network UNet")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_channels": 3}, "num_channels is 2 in the file but 3 in the registry"),
        ({"organs": {"liver": 0}}, r"organs.liver is \(1,\) in the file but \(0,\)"),
        ({"organs": {"spleen": 1}}, "organs.spleen is None in the file"),
        ({"spacing_mm": [3, 3, 3]}, "spacing_mm is"),
        ({"intensity": {"kind": "raw"}}, "intensity is"),
    ],
)
def test_a_registry_that_contradicts_the_file(
    path: Path, changes: dict[str, Any], match: str
) -> None:
    assert "teacher liver" in refused(path, match, **changes)


def test_a_registry_that_leaves_things_open_is_no_contradiction(path: Path) -> None:
    assert load(path, num_channels=None, spacing_mm=None).spacing_mm == GRID_MM
    assert load(path, spacing_mm=list(GRID_MM)).spacing_mm == GRID_MM


def test_a_tap_that_the_network_does_not_have(path: Path) -> None:
    message = refused(path, "no layer 'nowhere'", taps=["nowhere"])
    assert TAP in message


def test_a_window_that_the_network_cannot_take(path: Path) -> None:
    refused(path, r"cannot run windows of \(7, 8, 8\)", window=WindowConfig(shape=(7, 8, 8)))


class TestStudent:
    """A student.pt teaches as it stands, all its organs; channels are by id."""

    ENTRY: ClassVar[dict[str, Any]] = {
        "kind": "student", "num_channels": 3, "organs": {"liver": 1, "spleen": 2},
    }  # fmt: skip

    @pytest.fixture
    def student(self, tmp_path: Path) -> Path:
        record = StudentRecord(
            network=NETWORK, organs={"spleen": 7, "liver": 2}, spacing_mm=GRID_MM,
            intensity=Intensity(), patch=(8, 8, 8), steps=1, seed=0, supervision={"kind": "ms_kd"},
            validation_dice={}, teachers={}, trained_on=("liver-ct/a",), run_digest="0",
        )  # fmt: skip
        network = build_network(NETWORK, in_channels=1, out_channels=3)
        save_student(tmp_path / "student.pt", record, network)
        return tmp_path / "student.pt"

    def test_it_says_what_the_student_says(self, student: Path) -> None:
        teacher = load(student, **self.ENTRY)
        _, network = load_student(student)
        grid = Grid.axis_aligned((8, 8, 8), GRID_MM)
        image = Volume(np.arange(512, dtype=np.int16).reshape(8, 8, 8), grid)
        x = torch.from_numpy(Intensity().apply(image.array))[None, None]
        with torch.no_grad():
            expected = network(x)[0].numpy()
        np.testing.assert_allclose(teacher.predict(image).logits.array, expected, atol=1e-4)

    def test_organs_and_kind_are_held_against_the_file(self, student: Path, path: Path) -> None:
        swapped = self.ENTRY | {"organs": {"spleen": 1, "liver": 2}}
        refused(student, r"organs.spleen is \(2,\) in the file but \(1,\)", **swapped)
        refused(student, "not one that `pipeline train-teachers` wrote")
        refused(path, "not one that `pipeline train-student` wrote", **self.ENTRY)

    def test_one_of_sigmoids_is_refused(self, student: Path) -> None:
        content = torch.load(student, weights_only=True)
        content["record"] = content["record"].replace('"softmax"', '"sigmoid"')
        save_atomically(student, content)
        with pytest.raises(TeacherError, match="do not compete with a background"):
            load(student, **self.ENTRY)
