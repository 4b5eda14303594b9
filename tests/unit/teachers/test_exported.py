"""Exported networks: they say what the eager network says, or are refused with the reason."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.data.entries import TeacherEntry
from pipeline.data.labels import log_odds
from pipeline.data.patches import WindowConfig
from pipeline.data.volume import Grid, Volume
from pipeline.errors import TeacherError
from pipeline.teachers.exported import ExportedTeacher, FixedBatch
from tests.unit.teachers.made_bundles import exported_entry, seeded_network
from tests.unit.teachers.made_teachers import Payload
from tests.unit.teachers.teacher_contract import WINDOW, StoredNetworkContract, opened, refusal

# The contract's window as the network sees it, x first: a mix-up of axes cannot run unnoticed.
SEEN = (16, 12, 8)


def load(
    path: Path, *, window: WindowConfig = WINDOW, batch: int = 2, trusted: bool = False,
    **changes: Any,
) -> ExportedTeacher:  # fmt: skip
    entry = exported_entry(**changes)
    entry = entry.trusting() if trusted else entry
    return opened(ExportedTeacher, entry, path, window=window, batch=batch)


def refused(path: Path, match: str, **changes: Any) -> str:
    return refusal(match, f"teacher mine, {path}", lambda: load(path, **changes))


def image(shape: tuple[int, int, int] = (13, 20, 27)) -> Volume:
    hu = np.random.default_rng(0).integers(-200, 300, shape).astype(np.int16)
    return Volume(hu, Grid.axis_aligned(shape, (8, 6, 6)))


def script(path: Path, network: nn.Module) -> Path:
    torch.jit.script(network).save(str(path))
    return path


def export(path: Path, network: nn.Module, batch: int = 2, **options: Any) -> Path:
    torch.export.save(torch.export.export(network, (torch.rand(batch, 1, *SEEN),), **options), path)
    return path


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script(tmp_path_factory.mktemp("exported") / "net.ts", seeded_network())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exported") / "net.pt2", seeded_network())


class ExportedContract(StoredNetworkContract):
    no_weights = "neither a TorchScript nor a torch.export file|pickled module"
    numbers = (
        {"orientation": "LPS"},
        {"spacing_mm": [8, 6, 5]},
        {"intensity": {"kind": "window", "window_hu": [-57, 164]}},
        {"intensity": {"kind": "zscore", "window_hu": [-57, 164], "mean_hu": 10, "std_hu": 50}},
        {"window": WindowConfig(shape=(8, 12, 16), overlap=0.5)},
    )

    def entry(self, **changes: Any) -> TeacherEntry:
        return exported_entry(**changes)


class TestScript(ExportedContract):
    @pytest.fixture
    def path(self, scripted: Path, tmp_path: Path) -> Path:
        return Path(shutil.copy(scripted, tmp_path))

    def put_nan(self, path: Path) -> None:
        script(path, with_nan())


class TestProgram(ExportedContract):
    @pytest.fixture
    def path(self, program: Path, tmp_path: Path) -> Path:
        return Path(shutil.copy(program, tmp_path))

    def put_nan(self, path: Path) -> None:
        export(path, with_nan())


def with_nan() -> nn.Module:
    network = seeded_network()
    next(network.parameters()).data.view(-1)[0] = torch.nan
    return network


def eager_log_odds(volume: Volume, organ_channel: int) -> np.ndarray[Any, Any]:
    """By hand: one window that holds the image, x first, HU scaled to 0 .. 1."""
    shape = tuple(-(-n // 4) * 4 for n in volume.grid.shape)
    hu = np.full(shape, -1024.0)
    d, h, w = volume.grid.shape
    hu[:d, :h, :w] = volume.array
    scaled = ((hu.clip(-57, 164) + 57) / 221).astype(np.float32)
    with torch.inference_mode():
        out = seeded_network()(torch.from_numpy(scaled.T.copy())[None, None])[0]
    return log_odds(out.numpy().transpose(0, 3, 2, 1)[:, :d, :h, :w], [organ_channel], "softmax")


@pytest.mark.parametrize("form", ["torchscript", "torch.export"])
def test_parity_with_the_eager_network(tmp_path: Path, form: str) -> None:
    volume = image()
    window = WindowConfig(shape=(16, 20, 28))
    if form == "torchscript":
        path = script(tmp_path / "net", seeded_network())
    else:
        example = (torch.rand(1, 1, 28, 20, 16),)
        path = tmp_path / "net"
        torch.export.save(torch.export.export(seeded_network(), example), path)
    teacher = load(path, window=window)
    assert teacher.form == form
    prediction = teacher.predict(volume)
    assert prediction.logits.grid == volume.grid
    assert prediction.logits.array.dtype == np.float32
    for channel in (1, 2):
        ours = log_odds(prediction.logits.array, [channel], "softmax")
        theirs = eager_log_odds(volume, channel)
        assert 0 < (theirs > 0).mean() < 1
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        assert np.abs(ours - theirs).max() < 1e-3


def test_axes_of_another_order_and_direction(tmp_path: Path) -> None:
    """A network that is blind but for where it stands: a ramp along its first axis."""

    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ramp = torch.arange(x.shape[2], dtype=x.dtype)[:, None, None].expand_as(x)
            return torch.cat([torch.zeros_like(x), ramp, ramp], dim=1)

    path = script(tmp_path / "net.ts", Ramp())
    volume = image((5, 6, 7))
    window = WindowConfig(shape=(5, 6, 7))
    for orientation, axis, towards in (
        ("SAR", 0, 1),
        ("IAR", 0, -1),
        ("LPS", 2, -1),
        ("ASR", 1, 1),
    ):
        ramp = load(path, window=window, orientation=orientation).predict(volume).logits.array[1]
        steps = np.diff(ramp, axis=axis)
        np.testing.assert_allclose(steps, towards, atol=1e-4)


def test_a_fixed_program_states_its_own_window_and_batch(program: Path) -> None:
    teacher = load(program, window=WindowConfig(shape=(96, 96, 96), overlap=0.25), batch=7)
    assert teacher.window.shape == WINDOW.shape
    assert teacher.describe()["window"]["shape"] == list(WINDOW.shape)
    assert isinstance(teacher.network, FixedBatch)
    assert teacher.network.size == 2


def test_a_bounded_program_runs_as_many_windows_as_it_takes(tmp_path: Path) -> None:
    network = nn.Conv3d(1, 3, 3, padding=1)
    options = {"dynamic_shapes": ({0: torch.export.Dim("windows", min=1, max=4)},)}
    path = export(tmp_path / "net.pt2", network, **options)
    for wanted, size in ((1, 1), (3, 3), (9, 4)):
        taken = load(path, batch=wanted).network
        assert isinstance(taken, FixedBatch)
        assert taken.size == size


def test_a_window_out_of_bounds_is_explained(tmp_path: Path) -> None:
    side = {axis: torch.export.Dim(f"side{axis}", min=4, max=16) for axis in (2, 3, 4)}
    path = export(tmp_path / "net.pt2", nn.Conv3d(1, 3, 3, padding=1), dynamic_shapes=(side,))
    assert load(path).window.shape == WINDOW.shape
    message = refused(path, "cannot run", window=WindowConfig(shape=(8, 12, 17)))
    assert "<= 16" in message
    assert "it takes 2 x 1 x s" in message
    assert "window.shape" in message


def test_a_window_that_the_strides_do_not_divide(scripted: Path) -> None:
    message = refused(scripted, "for windows of", window=WindowConfig(shape=(8, 12, 15)))
    assert "of that size" in message


def test_the_entry_must_state_all_preprocessing_and_have_no_taps() -> None:
    data = exported_entry().model_dump(exclude_unset=True)
    for name in ("spacing_mm", "orientation", "intensity"):
        with pytest.raises(ValidationError, match=rf"give \['{name}'\]"):
            exported_entry().model_validate({k: v for k, v in data.items() if k != name})
    with pytest.raises(ValidationError, match="no layers to tap"):
        exported_entry(taps=["model.0"])
    with pytest.raises(ValidationError, match="one letter of each"):
        exported_entry(orientation="RAR")


# --- devices, dtypes, channels ------------------------------------------------------------------


class BoundToCuda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + torch.zeros(1, device="cuda")


def test_a_script_with_constants_on_a_gpu(tmp_path: Path) -> None:
    # torch's own words depend on whether anything has asked for CUDA in this process before.
    path = script(tmp_path / "net.ts", BoundToCuda())
    message = refused(path, "cannot run 2 windows of .* on cpu .*(CUDA|NVIDIA)")
    assert "cpu()" in message


def change_program(source: Path, path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return path


def test_a_program_exported_on_a_gpu(program: Path, tmp_path: Path) -> None:
    moved = change_program(
        program, tmp_path / "net.pt2", lambda name, data: data.replace(b'"cpu"', b'"cuda"')
    )
    message = refused(moved, "exported on a GPU, so it cannot run on cpu")
    assert "--device cuda" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    path = script(tmp_path / "net.ts", seeded_network().to(dtype))
    message = refused(path, "not float32")
    assert ".float()" in message


def test_a_network_that_rolls_dice(tmp_path: Path) -> None:
    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(torch.cat([x, x, x], dim=1), 0.5, training=True)

    refused(script(tmp_path / "net.ts", Dropping()), "something else each time")


def test_an_output_that_is_no_logits(tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3, 4))

    refused(script(tmp_path / "net.ts", Pooled()), r"gives \(2, 1\) for windows")


# --- files --------------------------------------------------------------------------------------


def test_a_damaged_script(scripted: Path, tmp_path: Path) -> None:
    def spoil(name: str, data: bytes) -> bytes:
        # Of all modules: their files have other names where a process has scripted them before.
        return data.replace(b"forward", b"f ( w", 1) if name.endswith(".py") else data

    path = change_program(scripted, tmp_path / "net.ts", spoil)
    refused(path, "torchscript file cannot be loaded")


def test_a_state_dict_is_no_network(tmp_path: Path) -> None:
    torch.save(seeded_network().state_dict(), tmp_path / "net.pt")
    refused(tmp_path / "net.pt", "a file of weights")


# --- torch.export files that would run code -----------------------------------------------------


def test_a_pickle_inside_a_program(program: Path, tmp_path: Path) -> None:
    """`torch.export.load` unpickles the sample inputs, whatever they are."""
    marker = tmp_path / "ran"
    torch.save((Payload(marker),), tmp_path / "payload.pt")

    def plant(name: str, data: bytes) -> bytes:
        return (tmp_path / "payload.pt").read_bytes() if "sample_inputs" in name else data

    path = change_program(program, tmp_path / "net.pt2", plant)
    message = refused(path, "more than a network.*pickle of more than tensors")
    assert "--trust" in message
    assert not marker.exists()
    # The trap is armed: trust runs it.
    with pytest.raises(TeacherError):
        load(path, trusted=True)
    assert marker.exists()


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"torch.ops.aten.conv3d.default", b"torch.os.system", "calls torch.os.system"),
        (b'"guards_code": []', b'"guards_code": ["open(\'x\')"]', "evaluates"),
        (b'"guards_code": []', b'"guards_code": ["L.__class__"]', "evaluates"),
        (b'{"as_int": 4}', b'{"as_expr": {"expr_str": "exit()", "hint": null}}', "evaluates"),
    ],
)
def test_a_program_that_reaches_further(
    program: Path, tmp_path: Path, old: bytes, new: bytes, match: str
) -> None:
    def plant(name: str, data: bytes) -> bytes:
        if not name.endswith("model.json"):
            return data
        plain = json.dumps(json.loads(data)).encode()
        assert old in plain
        return plain.replace(old, new, 1)

    refused(change_program(program, tmp_path / "net.pt2", plant), match)


def test_compiled_libraries_and_doubled_names(program: Path, tmp_path: Path) -> None:
    for name, match in (
        ("net/data/aotinductor/model/x.so", "aotinductor/model/x.so is no tensor"),
        ("net/data/constants/opaque_obj_0", "is no tensor"),
        ("net/MODELS/model.json", "two files of one name"),
    ):
        path = change_program(program, tmp_path / "net.pt2", lambda name, data: data)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"")
        refused(path, match)


def test_a_batch_of_any_number_is_cut_and_filled() -> None:
    sizes: list[int] = []

    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.shape[0])
            return x * 2

    batch = torch.rand(5, 1, 2, 3, 4)
    assert torch.equal(FixedBatch(Doubling(), 2)(batch), batch * 2)
    assert sizes == [2, 2, 2]
