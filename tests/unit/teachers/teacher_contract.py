"""What a teacher of every kind promises, as tests; one subclass per kind says what the kind is.

    class TestExported(StoredNetworkContract):
        def entry(self, **changes): ...
        ...

The subclass, or its module, has a fixture `path`: weights of its own, to be damaged, of a network
with `organs`.
"""

from __future__ import annotations

import os
import pickle
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import pytest
import torch

from pipeline.cache.schema import StorageConfig
from pipeline.config import digest
from pipeline.data.entries import TeacherEntry
from pipeline.data.patches import WindowConfig
from pipeline.data.volume import Grid, Volume
from pipeline.data.weights import digest_of, stamp_weights
from pipeline.errors import TeacherError
from pipeline.teachers.load import load_teacher
from pipeline.teachers.teacher import Teacher, organ_log_odds
from tests.tiny import teacher_digested
from tests.unit.teachers.made_teachers import Payload

WINDOW = WindowConfig(shape=(8, 12, 16), overlap=0.25)


T = TypeVar("T")


def weights_digest(entry: TeacherEntry, path: Path) -> str:
    return digest_of(entry, stamp_weights(entry, path))


def opened(
    kind: type[T], entry: TeacherEntry, path: Path, *, name: str = "mine",
    window: WindowConfig | None = None, batch: int = 1,
) -> T:  # fmt: skip
    """As stage one does."""
    teacher = load_teacher(
        name, entry, path,
        window=window or WindowConfig(), batch_size=batch, device=torch.device("cpu"),
    )  # fmt: skip
    assert isinstance(teacher, kind)
    return teacher


def refusal(match: str, where: str, act: Callable[[], object]) -> str:
    """What is said of a teacher that cannot be taken, where, and what to do."""
    with pytest.raises(TeacherError, match=match) as caught:
        act()
    assert caught.value.exit_code == 2
    assert where in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


class TeacherContract(ABC):
    """Subclass it, name the subclass `Test...`, and fill in the abstract method.

    Attributes:
        organs: organ -> channel.
        num_channels: that the network emits.
        spacing_mm: of the image that it is shown; what it asks for, if it asks.
        shape: of that image.
        tap: a layer of its network; None for a kind without taps.
        numbers: changes that change what it computes: fields of its entry, or `window`.
    """

    organs: ClassVar[Mapping[str, int]] = {"liver": 1, "spleen": 2}
    num_channels: ClassVar[int] = 3
    spacing_mm: ClassVar[tuple[float, float, float]] = (8, 6, 6)
    shape: ClassVar[tuple[int, int, int]] = (13, 20, 27)
    tap: ClassVar[str | None] = None
    numbers: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    @abstractmethod
    def entry(self, **changes: Any) -> TeacherEntry:
        """What a registry says of it; `changes` are fields."""

    def weights_file(self, path: Path) -> Path:
        """The file that holds its tensors."""
        return path

    def load(
        self, path: Path, *, window: WindowConfig = WINDOW, batch: int = 2, **changes: Any
    ) -> Teacher:
        return cast(
            Teacher, opened(object, self.entry(**changes), path, window=window, batch=batch)
        )

    def image(self) -> Volume:
        """About as many HU above soft tissue as below."""
        hu = np.random.default_rng(0).integers(-200, 300, self.shape).astype(np.int16)
        return Volume(hu, Grid.axis_aligned(self.shape, self.spacing_mm))

    def taps(self) -> list[str]:
        """As a registry names them."""
        return [self.tap] if self.tap else []

    def says(self, path: Path, **changes: Any) -> str:
        """The digest of what its numbers depend on, but for the bytes of its weights."""
        teacher = self.load(path, **changes)
        organs = {"liver": (1,)}
        says = teacher_digested("w", teacher.describe(), (3, 3, 3), StorageConfig(), organs=organs)
        return digest(says)

    def refused(self, path: Path, match: str, **changes: Any) -> None:
        """It is not loaded, or what it says of an image is not taken."""
        entry, where = self.entry(**changes), "teacher mine"
        with pytest.raises(TeacherError, match=match) as caught:
            organ_log_odds(self.load(path, **changes).predict(self.image()), entry, where=where)
        assert caught.value.exit_code == 2
        assert caught.value.fix
        assert "teacher mine" in str(caught.value)

    def test_log_odds_of_each_organ_from_all_channels(self, path: Path) -> None:
        teacher, image = self.load(path, taps=self.taps()), self.image()
        assert teacher.spacing_mm in (None, self.spacing_mm)
        prediction = teacher.predict(image)
        logits = prediction.logits
        assert logits.array.shape == (self.num_channels, *logits.grid.shape)
        assert logits.array.dtype == np.float32
        odds = organ_log_odds(prediction, self.entry(), where="x")
        assert odds.keys() == self.organs.keys()
        for found in odds.values():
            assert found.grid == logits.grid
            assert found.array.dtype == np.float32
            assert found.array.std() > 0
        assert list(prediction.features) == self.taps()
        for feature in prediction.features.values():
            assert feature.array.dtype == np.float32
            assert feature.grid.shape == feature.array.shape[1:]
            assert max(feature.grid.shape) < max(logits.grid.shape)

    def test_how_many_windows_at_a_time_is_no_matter(self, path: Path) -> None:
        image = self.image()
        one, several = (self.load(path, batch=batch).predict(image) for batch in (1, 3))
        np.testing.assert_allclose(one.logits.array, several.logits.array, atol=1e-5)
        assert self.says(path, batch=1) == self.says(path, batch=3)

    def test_what_it_says_of_itself_is_what_changes_its_numbers(self, path: Path) -> None:
        first = self.says(path)
        assert self.says(path) == first
        assert self.numbers
        for changes in self.numbers:
            assert self.says(path, **changes) != first, changes

    def test_it_is_known_by_its_bytes_wherever_they_lie(self, path: Path, tmp_path: Path) -> None:
        first = weights_digest(self.entry(), path)
        moved = Path(shutil.move(path, tmp_path / "elsewhere"))
        os.utime(self.weights_file(moved), (1, 1))
        assert weights_digest(self.entry(), moved) == first
        with pytest.raises(TeacherError, match=r"cannot be read|no such folder|holds no fold"):
            weights_digest(self.entry(), path)
        with self.weights_file(moved).open("ab") as file:
            file.write(b"\0")
        assert weights_digest(self.entry(), moved) != first

    def test_a_process_gets_the_entry_with_its_trust(self) -> None:
        for entry in (self.entry(), self.entry().trusting()):
            handed_on = pickle.loads(pickle.dumps(entry))
            assert (handed_on, handed_on.trusted) == (entry, entry.trusted)

    def test_weights_that_are_not_there(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none", "do(es)? not exist|no such folder")

    def test_a_registry_of_other_channels(self, path: Path) -> None:
        said = {"organs": {"liver": 1}, "num_channels": 7}
        self.refused(path, rf"(?s)\b{self.num_channels}\b.*\b7\b", **said)
        self.refused(path, r"\b9\b", organs={"liver": 9})


class StoredNetworkContract(TeacherContract):
    """A kind whose file of tensors this project reads.

    Attributes:
        no_weights: what is said of a file of anything else.
    """

    no_weights: ClassVar[str]

    @abstractmethod
    def put_nan(self, path: Path) -> None:
        """One of its weights becomes NaN."""

    def test_weights_that_are_no_numbers(self, path: Path) -> None:
        self.put_nan(path)
        self.refused(path, "NaN or infinity")

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 half a zip"])
    def test_a_file_of_something_else(self, path: Path, content: bytes) -> None:
        self.weights_file(path).write_bytes(content)
        self.refused(path, self.no_weights)

    def test_a_truncated_file(self, path: Path) -> None:
        file = self.weights_file(path)
        file.write_bytes(file.read_bytes()[:-500])
        self.refused(path, self.no_weights)

    @pytest.mark.parametrize("writer", ["torch", "pickle"])
    def test_a_file_with_code_is_refused_and_its_code_not_run(
        self, path: Path, tmp_path: Path, writer: str
    ) -> None:
        marker, file = tmp_path / "ran", self.weights_file(path)
        content = {"record": Payload(marker), "model": {}, "state": {}}
        if writer == "torch":
            torch.save(content, file)
        else:
            file.write_bytes(pickle.dumps(content, protocol=2))
        self.refused(path, self.no_weights)
        assert not marker.exists()
        # The trap is armed: whoever trusts the file runs the code.
        torch.load(file, weights_only=False) if writer == "torch" else pickle.load(file.open("rb"))
        assert marker.exists()
