"""`torch.load` alone reads nearly every flipped bit without a word; a sealed file never."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.networks.tensor_file import load_sealed, save_atomically

CONTENT = {"step": 7, "weights": torch.arange(400.0), "nested": {"a": [1, "x"]}}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "state.pt"
    save_atomically(path, CONTENT)
    return path


def test_what_is_written_is_read_back_here_and_by_torch_alone(sealed: Path) -> None:
    for found in (load_sealed(sealed), torch.load(sealed, weights_only=True)):
        assert found["step"] == 7
        assert torch.equal(found["weights"], CONTENT["weights"])
        assert found["nested"] == CONTENT["nested"]
    assert [p.name for p in sealed.parent.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("unsealed", [False, True])
def test_every_flipped_bit_is_found(sealed: Path, unsealed: bool) -> None:
    intact = sealed.read_bytes()
    drawn = random.Random(0)
    ends = [*range(40), *range(len(intact) - 140, len(intact))]
    places = [*ends, *(drawn.randrange(len(intact)) for _ in range(300))]
    silent = wrong = 0
    for place in places:
        changed = bytearray(intact)
        changed[place] ^= 1 << drawn.randrange(8)
        sealed.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            load_sealed(sealed, unsealed=unsealed)
        try:
            found = torch.load(io.BytesIO(bytes(changed)), weights_only=True)
            silent += 1
            wrong += not torch.equal(found["weights"], CONTENT["weights"])
        except Exception:
            continue
    # What it is for: torch itself would have read most of them.
    assert silent > len(places) / 2
    assert wrong > 20


@pytest.mark.parametrize("unsealed", [False, True])
def test_every_truncation_is_found(sealed: Path, unsealed: bool) -> None:
    intact = sealed.read_bytes()
    for kept in [0, 1, 30, len(intact) // 2, *range(len(intact) - 120, len(intact))]:
        sealed.write_bytes(intact[:kept])
        with pytest.raises(CheckpointError):
            load_sealed(sealed, unsealed=unsealed)


def test_a_file_without_a_seal_is_taken_where_asked_for_if_its_entries_are_right(
    tmp_path: Path,
) -> None:
    path = tmp_path / "old.pt"
    torch.save(CONTENT, path)
    with pytest.raises(CheckpointError, match="not those that were written"):
        load_sealed(path)
    assert load_sealed(path, unsealed=True)["step"] == 7
    intact = path.read_bytes()
    changed = bytearray(intact)
    changed[intact.index(torch.tensor(300.0).numpy().tobytes())] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="not those that were written"):
        load_sealed(path, unsealed=True)
