from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from pipeline.figures import (
    Marked,
    save_curves,
    save_planes,
)

SHAPE = (10, 12, 14)
TERMS = {"cross_entropy": [(1, 2.0), (2, 1.5), (3, 1.0)], "dice": [(1, 0.9)]}
DICE = {"liver": [(2, 0.4), (3, 0.6)]}


def picture(path: Path) -> npt.NDArray[Any]:
    return np.asarray(matplotlib.image.imread(path))[..., :3]


def image() -> npt.NDArray[np.int16]:
    return np.random.default_rng(0).integers(-160, 240, SHAPE).astype(np.int16)


def block(*start: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(SHAPE, dtype=np.bool_)
    mask[tuple(slice(s, s + 4) for s in start)] = True
    return mask


def overlay(path: Path, panels: Any, colours: Any = None) -> npt.NDArray[Any]:
    colours = colours or {"liver": "#e6550d"}
    columns = {
        heading: {name: Marked(mask, (1,)) for name, mask in regions.items()}
        for heading, regions in panels.items()
    }
    save_planes(
        path, image(), columns, (3.0, 2.0, 2.0),
        colours=colours, legend={name: name for name in colours}, title=["a case"],
    )  # fmt: skip
    return picture(path)


def near(colour: str, pixels: npt.NDArray[Any]) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(pixels - np.array(to_rgb(colour))).max(axis=-1) < 0.02).sum())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they would be saved; drawing one takes longer than anything else here."""
    seen: list[Figure] = []

    def keep(self: Figure, path: Path, **options: object) -> None:
        seen.append(self)
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    return seen


class TestCurves:
    def test_a_picture_that_is_not_blank(self, tmp_path: Path) -> None:
        save_curves(tmp_path / "deep" / "progress.png", TERMS, DICE)
        found = picture(tmp_path / "deep" / "progress.png")
        assert found.std() > 0.02
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["progress.png"]

    def test_every_series_is_in_its_panel(self, undrawn: list[Figure], tmp_path: Path) -> None:
        wait = [(1, 0.5), (2, 0.01)]
        save_curves(
            tmp_path / "a.png", TERMS, DICE,
            samples_per_second=[(1, 3.0), (2, 4.0)], data_wait=wait, title="ms_kd, step 3",
        )  # fmt: skip
        assert undrawn[0].get_suptitle() == "ms_kd, step 3"
        found = {
            ax.get_title(): {tuple(line.get_ydata()) for line in ax.get_lines()}
            for ax in undrawn[0].axes
        }
        assert found == {
            "Training loss, weighted terms": {(2.0, 1.5, 1.0), (0.9,)},
            "Validation, labelled organs": {(0.4, 0.6)},
            "Throughput": {(3.0, 4.0)},
            "Waiting for data": {(50.0, 1.0)},
        }

    def test_the_legend_is_beside_the_curves_and_says_the_last_value(
        self, undrawn: list[Figure], tmp_path: Path
    ) -> None:
        save_curves(tmp_path / "a.png", {**TERMS, "total": [(1, 2.9)]}, DICE)
        undrawn[0].draw_without_rendering()
        texts = []
        for ax in undrawn[0].axes[-2:]:
            legend = ax.get_legend()
            assert legend is not None
            assert legend.get_window_extent().x0 >= ax.get_window_extent().x1
            texts.append([text.get_text() for text in legend.get_texts()])
        assert texts == [["total 2.9", "cross entropy 1", "dice 0.9"], ["liver 0.60"]]

    @pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 700])
    def test_curves_of_any_length(self, undrawn: list[Figure], tmp_path: Path, length: int) -> None:
        points = [(step, float(step % 7)) for step in range(1, length + 1)]
        save_curves(tmp_path / "progress.png", {"loss": points}, {}, data_wait=points)
        for ax in (undrawn[0].axes[-2], undrawn[0].axes[1]):
            raw, smooth = (np.asarray(line.get_ydata()) for line in ax.get_lines())
            assert raw.shape == smooth.shape == (length,)
            assert np.isfinite(smooth).all()
            assert smooth.mean() == pytest.approx(raw.mean(), rel=0.1)


class TestOverlay:
    def test_it_shows_the_ct_and_every_region_in_its_colour(self, tmp_path: Path) -> None:
        liver, spleen = block(2, 2, 2), block(4, 6, 8)
        found = overlay(
            tmp_path / "overlay.png",
            {"CT": {}, "reference": {"liver": liver, "spleen": spleen}},
            colours={"liver": "#ff0000", "spleen": "#0000ff"},
        )
        # The legend shows pure colours.
        assert near("#ff0000", found) > 50
        assert near("#0000ff", found) > 50
        assert found.std() > 0.1


class TestPlanes:
    def drawn(self, path: Path, **where: slice) -> npt.NDArray[Any]:
        values = np.zeros(SHAPE, dtype=np.uint8)
        values[tuple(where.get(axis, slice(3, 7)) for axis in "zyx")] = 7
        panels = {"x": {"r": Marked(values, (7, 8))}}
        save_planes(
            path, image(), panels, (3.0, 2.0, 2.0),
            colours={"r": "#ff0000"}, legend={}, title=["a case"],
        )  # fmt: skip
        found = picture(path)
        return np.asarray(found[..., 0] - found[..., 1] > 0.2)

    def test_sides_are_where_radiologists_look_for_them(self, tmp_path: Path) -> None:
        # In RAS+, indices grow towards superior, anterior and right.
        red = self.drawn(tmp_path / "a.png", z=slice(6, 10), y=slice(8, 12), x=slice(10, 14))
        rows, columns = np.nonzero(red)
        assert columns.mean() < red.shape[1] / 2, "right and anterior lie on the left"
        assert len(np.unique(np.diff(np.unique(rows)) > 1)) == 2, "more than one plane shows it"
        other = self.drawn(tmp_path / "b.png", z=slice(0, 4), y=slice(0, 4), x=slice(0, 4))
        assert np.nonzero(other)[1].mean() > other.shape[1] / 2
        assert rows.mean() < np.nonzero(other)[0].mean(), "superior and anterior lie at the top"

    def test_one_slice_is_one_plane(self, tmp_path: Path) -> None:
        values = np.zeros((1, *SHAPE[1:]), dtype=np.uint8)
        values[0, 3:9, 3:9] = 7
        save_planes(
            tmp_path / "a.png", image()[:1], {"x": {"r": Marked(values, (7,))}},
            (3.0, 2.0, 2.0), colours={"r": "#ff0000"}, legend={}, title=["a slice"],
        )  # fmt: skip
        found = picture(tmp_path / "a.png")
        red = np.nonzero(found[..., 0] - found[..., 1] > 0.2)[0]
        assert set(np.diff(np.unique(red))) == {1}
        assert found.shape[0] < 2 * found.shape[1]


def full_disk(self: Figure, path: Path, **options: object) -> None:
    Path(path).write_bytes(b"half a picture")
    raise OSError("No space left on device")


class TestFailure:
    def test_nothing_is_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Figure, "savefig", full_disk)
        figures = plt.get_fignums()
        with pytest.raises(OSError, match="No space"):
            save_curves(tmp_path / "progress.png", TERMS, DICE)
        assert list(tmp_path.iterdir()) == []
        assert plt.get_fignums() == figures

    def test_a_colour_that_is_none_leaves_no_file_and_no_figure(self, tmp_path: Path) -> None:
        figures = plt.get_fignums()
        with pytest.raises(ValueError, match="octarine"):
            overlay(
                tmp_path / "a.png", {"x": {"liver": block(1, 1, 1)}}, colours={"liver": "octarine"}
            )
        assert list(tmp_path.iterdir()) == []
        assert plt.get_fignums() == figures
