from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.labels import Intensity
from pipeline.errors import CheckpointError, WorkFolderError
from pipeline.networks.by_name import build_network
from pipeline.student.checkpoint import (
    StudentRecord,
    load_newest,
    load_student,
    read_record,
    save_student,
    save_training,
    training_checkpoints,
)
from pipeline.student.network import build_student
from tests.tiny import NETWORK, file_limit


def record() -> StudentRecord:
    return StudentRecord(
        network=NETWORK,
        organs={"spleen": 7, "liver": 2},
        spacing_mm=(3.0, 2.0, 1.5),
        intensity=Intensity(kind="zscore", window_hu=(-200, 300), mean_hu=10, std_hu=50),
        patch=(16, 16, 16),
        steps=4,
        seed=1,
        supervision={"kind": "marginal"},
        validation_dice={"liver": 0.5, "spleen": None},
        teachers={"liver": "abc"},
        trained_on=("liver-ct/a",),
        run_digest="0" * 64,
    )


@pytest.fixture
def student(tmp_path: Path) -> Path:
    path = tmp_path / "student.pt"
    torch.manual_seed(0)
    save_student(path, record(), build_network(NETWORK, in_channels=1, out_channels=3))
    return path


class TestStudent:
    def test_a_record_of_before_the_youngest_fields_is_one(self) -> None:
        told = record().model_dump(mode="json", exclude={"postprocessing", "mirrored"})
        assert StudentRecord.model_validate(told) == record()

    def test_what_is_written_is_read_back(self, student: Path) -> None:
        found, network = load_student(student)
        assert found == read_record(student) == record()
        assert found.label_space.organs == ("liver", "spleen")
        assert not network.training
        torch.manual_seed(0)
        original = build_network(NETWORK, in_channels=1, out_channels=3)
        image = torch.randn(1, 1, 16, 16, 16)
        assert torch.equal(network(image), original.eval()(image))

    def test_a_student_of_sigmoids_is_read_back_as_one(self, tmp_path: Path) -> None:
        original = build_student(NETWORK, 2, "sigmoid").eval()
        save_student(tmp_path / "one.pt", record().model_copy(update={"head": "sigmoid"}), original)
        found, network = load_student(tmp_path / "one.pt")
        assert found.head == "sigmoid"
        image = torch.randn(1, 1, 16, 16, 16)
        assert torch.equal(network(image), original(image))

    def test_a_file_from_before_there_were_heads_ends_in_a_softmax(self, student: Path) -> None:
        content = torch.load(student, weights_only=True)
        older = json.loads(content["record"])
        del older["head"]
        torch.save({**content, "record": json.dumps(older)}, student)
        assert load_student(student)[0] == record()
        assert load_student(student)[0].head == "softmax"

    def test_absent(self, tmp_path: Path) -> None:
        for read in (load_student, read_record):
            with pytest.raises(CheckpointError, match=r"nowhere\.pt: the file does not exist"):
                read(tmp_path / "nowhere.pt")

    @pytest.mark.parametrize(
        "content",
        [torch.zeros(3), torch.zeros(()), [1, 2], {}, {"record": "{}"}, {"record": 3, "state": {}},
         {"record": record().model_dump_json()}, {"record": record().model_dump_json(), "state": 5},
         {"record": record().model_dump_json(), "state": {"x": torch.zeros(1)}}],
    )  # fmt: skip
    def test_another_tensor_file_is_no_student(self, tmp_path: Path, content: Any) -> None:
        path = tmp_path / "other.pt"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"other\.pt: not a student"):
            load_student(path)

    def test_weights_of_another_network_are_refused(self, student: Path) -> None:
        content = torch.load(student, weights_only=True)
        smaller = json.loads(content["record"])
        smaller["network"]["args"]["channels"] = [2, 4, 4]
        torch.save({**content, "record": json.dumps(smaller)}, student)
        with pytest.raises(CheckpointError, match="not a student"):
            load_student(student)

    @pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
    def test_a_truncated_file_is_named(self, student: Path, kept: float) -> None:
        data = student.read_bytes()
        student.write_bytes(data[: int(kept * len(data)) if kept == 0.5 else int(kept)])
        for read in (load_student, read_record):
            with pytest.raises(CheckpointError, match=r"student\.pt"):
                read(student)

    @pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {}, {"record": 3, "state": {}}])
    def test_a_record_is_not_found_in_another_file(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=r"other\.pt: not a (student|plain)"):
            read_record(tmp_path / "other.pt")

    def test_a_folder_is_no_student(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="not a plain tensor file"):
            load_student(tmp_path)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_file_that_carries_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, marker = tmp_path / "student.pt", tmp_path / "exploded"
    content = {"record": record().model_dump_json(), "state": _Bomb(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match="not a plain tensor file") as refused:
        load_student(path)
    assert "weights_only" not in str(refused.value)  # torch advises to run the code
    if how == "torch.save":
        assert read_record(path) == record()
    else:
        with pytest.raises(CheckpointError, match="not"):
            read_record(path)
    assert not marker.exists()


class TestTraining:
    def _save(self, folder: Path, *steps: int) -> None:
        for step in steps:
            save_training(folder, step, {"weights": torch.full((1000,), float(step))})

    def _names(self, folder: Path) -> list[str]:
        return sorted(p.name for p in folder.iterdir())

    def test_the_last_two_are_kept(self, tmp_path: Path) -> None:
        self._save(tmp_path, 5, 10, 15, 100)
        assert self._names(tmp_path) == ["step_00000015.pt", "step_00000100.pt"]

    def test_two_good_ones_are_kept_beside_a_damaged_later_one(self, tmp_path: Path) -> None:
        self._save(tmp_path, 9, 20)
        training_checkpoints(tmp_path)[-1].write_bytes(b"")
        self._save(tmp_path, 12)
        assert self._names(tmp_path) == ["step_00000009.pt", "step_00000012.pt"]

    def test_what_a_killed_writer_left_goes(self, tmp_path: Path) -> None:
        (tmp_path / ".step_00000003.pt.123.tmp").write_bytes(b"half")
        self._save(tmp_path, 4)
        assert self._names(tmp_path) == ["step_00000004.pt"]

    def test_on_a_full_disk_the_one_before_stays(self, tmp_path: Path) -> None:
        """As a limit on the size of files does it, to torch's own writer, too."""
        self._save(tmp_path, 9)
        before = training_checkpoints(tmp_path)[0].read_bytes()
        for limit in (len(before) - 1, 100):
            with file_limit(limit), pytest.raises(WorkFolderError) as caught:
                self._save(tmp_path, 10)
            assert str(caught.value) == (
                f"{tmp_path / 'step_00000010.pt'}: it cannot be written (File too large). Check "
                "free space, quota and permissions, then run the same command again."
            )
            assert self._names(tmp_path) == ["step_00000009.pt"]
            assert training_checkpoints(tmp_path)[0].read_bytes() == before

    def test_none_readable_is_an_error_and_nothing_is_deleted(self, tmp_path: Path) -> None:
        self._save(tmp_path, 9, 10)
        for path in training_checkpoints(tmp_path):
            path.write_bytes(b"not a zip")
        with pytest.raises(CheckpointError, match="none of 2 checkpoints"):
            load_newest(tmp_path)
        assert len(self._names(tmp_path)) == 2
