from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pipeline.data.volume import Array, Grid, Volume
from pipeline.errors import TeacherError
from tests.integration.real_ct.allconvunet import (
    BOX_MM,
    GRID_SHAPE,
    AllConvTeacher,
    AllConvUNet,
    load,
    weight_shapes,
)
from tests.shared_data import needs_shared_data, shared_data_dir

# A field of view larger than the box in every direction, off-centre in the world, anisotropic.
SCAN = Grid.axis_aligned((70, 90, 120), (3.0, 3.5, 4.0), (-310.0, 42.0, -185.0))


def teacher(*, taps: tuple[str, ...] = (), seed: int = 0) -> AllConvTeacher:
    torch.manual_seed(seed)
    return AllConvTeacher(AllConvUNet().eval(), taps=taps, device="cpu")


def passing_its_input_on(
    monkeypatch: pytest.MonkeyPatch, seen: list[Tensor] | None = None
) -> AllConvTeacher:
    """A teacher whose logits are the image that its network was given, nine times."""

    def forward(_self: AllConvUNet, image: Tensor) -> Tensor:
        if seen is not None:
            seen.append(image)
        return image.expand(-1, 9, -1, -1, -1)

    monkeypatch.setattr(AllConvUNet, "forward", forward)
    return teacher()


def world_of(grid: Grid) -> npt.NDArray[np.float64]:
    """(3, D, H, W): millimetres along superior, anterior, right of every voxel centre."""
    index = np.indices(grid.shape).reshape(3, -1)
    world: npt.NDArray[np.float64] = grid.matrix[:3, :3] @ index + grid.matrix[:3, 3:]
    return world.reshape(3, *grid.shape)


def centroid_mm(mass: Array, grid: Grid) -> npt.NDArray[np.float64]:
    weight = mass.astype(np.float64)
    centre: npt.NDArray[np.float64] = (world_of(grid) * weight).sum(axis=(1, 2, 3)) / weight.sum()
    return centre


def blob_scan(voxel: tuple[int, int, int]) -> Volume:
    array = np.zeros(SCAN.shape, dtype=np.int16)
    z, y, x = voxel
    array[z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3] = 1000
    return Volume(array, SCAN)


def ramp(grid: Grid) -> npt.NDArray[np.float64]:
    """HU that rise by a different amount per mm along each direction of the world."""
    superior, anterior, right = world_of(grid)
    rising: npt.NDArray[np.float64] = 4000 + 6.0 * superior + 2.0 * anterior + 1.0 * right
    return rising


def test_layers_have_the_described_widths_and_strides() -> None:
    network = AllConvUNet().eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda _module, _inputs, output: shapes.update({name: tuple(output.shape[1:])})

    for name, module in network.named_children():
        module.register_forward_hook(remember(name))
    with torch.inference_mode():
        network(torch.zeros(1, 1, 72, 72, 72))
    encoder = {
        "conv0": (5, 72),
        "conv1": (14, 36),
        "conv11": (14, 36),
        "conv2": (28, 18),
        "conv22": (28, 18),
        "conv3": (42, 9),
        "conv33": (42, 9),
        "conv4": (56, 5),
        "conv44": (56, 5),
        "conv5": (70, 3),
        "conv55": (70, 3),
    }
    decoder = {
        "conv6dU": (56, 5),
        "conv6cU": (42, 9),
        "conv6bU": (28, 18),
        "conv6U": (14, 36),
        "conv7U": (9, 72),
        "conv77U": (9, 72),
    }
    for name, (width, size) in (encoder | decoder).items():
        assert shapes[name] == (width, size, size, size), name


def test_size_is_the_published_one() -> None:
    assert sum(int(np.prod(s)) for s in weight_shapes(AllConvUNet()).values()) == 884_888


@pytest.mark.realdata
@needs_shared_data
@pytest.mark.parametrize("fold", [1, 2, 3, 4])
def test_array_names_are_the_module_names(fold: int) -> None:
    folder = shared_data_dir()
    assert folder is not None
    path = folder / "teacher_weights" / f"allconvunet_tcia_fold{fold}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name].shape for name in arrays.files}
        first = arrays["conv0.weight"]
    assert found == weight_shapes(AllConvUNet())
    loaded = load(path, taps=["conv33"], device="cpu").network
    assert not loaded.training
    np.testing.assert_array_equal(loaded.state_dict()["conv0.weight"].numpy(), first)


def save_weights(path: Path, **changed: Array | None) -> Path:
    state = AllConvUNet().state_dict()
    arrays: dict[str, Any] = {name: state[name].numpy() for name in weight_shapes(AllConvUNet())}
    arrays.update(changed)
    with path.open("wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_weights_survive_the_file(tmp_path: Path) -> None:
    marked = np.full((5,), 0.25, dtype=np.float32)
    loaded = load(save_weights(tmp_path / "w.npz", **{"conv0.bias": marked}), taps=(), device="cpu")
    np.testing.assert_array_equal(loaded.network.state_dict()["conv0.bias"].numpy(), marked)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv33.bias": None}, r"conv33\.bias is missing"),
        ({"conv99.bias": np.zeros(3)}, r"conv99\.bias is not of this network"),
        ({"conv0.bias": np.zeros(6)}, r"conv0\.bias has shape \(6,\), not \(5,\)"),
        ({"conv0.bias": np.full(5, np.nan)}, r"conv0\.bias holds values that are not finite"),
    ],
)
def test_weights_of_another_network_are_refused(
    tmp_path: Path, changed: dict[str, Array | None], message: str
) -> None:
    path = save_weights(tmp_path / "other.npz", **changed)
    with pytest.raises(TeacherError, match=message) as caught:
        load(path, taps=(), device="cpu")
    assert str(path) in str(caught.value)
    assert caught.value.fix


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    good = save_weights(tmp_path / "good.npz")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.npz").write_text("not weights")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "pickle.npz", anything=np.array([{}], dtype=object))
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("cut.npz", "text.npz", "empty.npz", "pickle.npz", "one.npy", "absent.npz"):
        with pytest.raises(TeacherError) as caught:
            load(tmp_path / name, taps=(), device="cpu")
        assert name in str(caught.value)


def test_an_unknown_tap_or_box_is_refused(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "w.npz")
    with pytest.raises(TeacherError, match=r"no module named conv34.*conv33"):
        load(path, taps=["conv33", "conv34"], device="cpu")
    with pytest.raises(TeacherError, match="box_mm"):
        load(path, taps=(), device="cpu", box_mm=(150, 0, 320))


def test_description_is_plain_data_and_follows_the_arguments(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "w.npz")
    usual = load(path, taps=["conv33"], device="cpu").describe()
    other = load(path, taps=["conv33"], device="cpu", box_mm=(150, 225, 300)).describe()
    assert usual["box_mm"] == list(BOX_MM)
    assert usual["taps"] == ["conv33"]
    assert {key for key in usual if usual[key] != other[key]} == {"box_mm"}


def test_box_hangs_from_the_top_and_is_centred_on_the_body() -> None:
    array = np.full(SCAN.shape, -1000, dtype=np.int16)
    array[:, 30:71, 40:101] = 40  # middle: y 50, x 70
    grid = teacher().box_grid(Volume(array, SCAN))
    np.testing.assert_allclose(np.array(grid.spacing_mm) * GRID_SHAPE, BOX_MM)
    low, high = grid.matrix @ [-0.5, -0.5, -0.5, 1], grid.matrix @ [143.5, 143.5, 143.5, 1]
    top = SCAN.matrix @ [69.5, 50, 70, 1]
    assert high[0] == pytest.approx(top[0])
    np.testing.assert_allclose((low + high)[1:3] / 2, top[1:3])


def test_box_follows_an_oblique_scan() -> None:
    angle = np.deg2rad(10)
    matrix = SCAN.matrix
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix[:2, :3] = turn @ matrix[:2, :3]
    oblique = Grid.from_matrix(SCAN.shape, matrix)
    grid = teacher().box_grid(Volume(np.zeros(SCAN.shape, dtype=np.int16), oblique))
    index_map = oblique.index_map_from(grid)
    np.testing.assert_allclose(index_map[:3, :3], np.diag(np.diag(index_map)[:3]), atol=1e-9)


@pytest.mark.parametrize("voxel", [(60, 50, 40), (40, 36, 85)])
def test_a_blob_comes_back_where_it_was(
    monkeypatch: pytest.MonkeyPatch, voxel: tuple[int, int, int]
) -> None:
    scan = blob_scan(voxel)
    logits = passing_its_input_on(monkeypatch).predict(scan).logits
    assert logits.array.shape == (9, *GRID_SHAPE)
    assert logits.array.dtype == np.float32
    found = centroid_mm(logits.array[6], logits.grid)
    apart = np.abs(found - centroid_mm(scan.array, SCAN))
    assert np.all(apart < np.array(logits.spacing_mm)), apart


def test_the_network_sees_left_and_inferior_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    # high up, towards the front, on the patient's right
    passing_its_input_on(monkeypatch, seen).predict(blob_scan((62, 58, 80)))
    (image,) = seen
    assert image.shape == (1, 1, *GRID_SHAPE)
    x, y, z = (float(c.double().mean()) for c in torch.nonzero(image[0, 0] > 500).T)
    assert x < 72, "the network's first axis runs from right to left"
    assert y > 72, "the second from back to front"
    assert z < 72, "the third from top to bottom"


def test_resampling_is_trilinear(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Volume(np.rint(ramp(SCAN)).astype(np.int16), SCAN)
    logits = passing_its_input_on(monkeypatch).predict(scan).logits
    # Half a voxel below the top face lies beyond the last voxel centre: edge values, no slope.
    inside = world_of(logits.grid)[0] < SCAN.matrix[0, 3] + 69 * 3.0
    error = np.abs(logits.array[0] - ramp(logits.grid))
    assert error[inside].max() < 1.0
    assert error[~inside].max() < 6.0 * 1.5 + 1.0


def test_beyond_the_field_of_view_is_air(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Grid.axis_aligned((30, 90, 50), (3.0, 3.5, 4.0))  # 90 mm high, 200 mm wide
    ones = Volume(np.ones(small.shape, dtype=np.int16), small)
    logits = passing_its_input_on(monkeypatch).predict(ones).logits
    superior, _, right = world_of(logits.grid)
    seen = (superior > -1.5) & (right > -2.0) & (right < 198.0)
    np.testing.assert_array_equal(logits.array[0], np.where(seen, 1.0, -1024.0))


@pytest.mark.parametrize(("tap", "stride", "num_cells"), [("conv1", 2, 72), ("conv5", 32, 5)])
def test_features_lie_at_the_centres_of_their_cells(tap: str, stride: int, num_cells: int) -> None:
    """Convolutions that hand on their middle voxel turn a ramp into the ramp at their cells."""
    ramp_teacher = teacher(taps=(tap,))
    with torch.no_grad():
        for name in ("0", "1", "11", "2", "22", "3", "33", "4", "44", "5"):
            convolution = ramp_teacher.network.get_submodule(f"conv{name}")
            assert isinstance(convolution, torch.nn.Conv3d)
            assert convolution.bias is not None
            convolution.weight.zero_()
            convolution.bias.zero_()
            convolution.weight[0, 0, 1, 1, 1] = 1
    scan = Volume(np.rint(ramp(SCAN)).astype(np.int16), SCAN)
    prediction = ramp_teacher.predict(scan)
    feature = prediction.features[tap]
    assert feature.array.shape[1:] == (num_cells,) * 3
    assert feature.array.dtype == np.float32
    fine = np.array(prediction.logits.spacing_mm)
    np.testing.assert_allclose(np.array(feature.spacing_mm), fine * stride)
    error = np.abs(feature.array[0] - ramp(feature.grid))
    # One voxel of the network's grid, in any direction, would be more than 2 HU.
    assert error[:-1].max() < 1.5
    assert error[-1].max() < 1.5 + 6.0 * 1.5  # the top cells look at the top face


def test_a_tap_is_what_the_module_put_out() -> None:
    tapped = teacher(taps=("conv33", "batch44"))
    prediction = tapped.predict(blob_scan((60, 50, 40)))
    assert set(prediction.features) == {"conv33", "batch44"}
    assert prediction.features["conv33"].array.shape == (42, 18, 18, 18)
    assert prediction.features["batch44"].array.shape == (56, 9, 9, 9)
    assert not tapped.network.get_submodule("conv33")._forward_hooks, (
        "a teacher keeps no hook between cases"
    )
