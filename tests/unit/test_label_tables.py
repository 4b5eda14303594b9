from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pipeline.data.labels import LabelSpace
from pipeline.data.nifti import read_grid, write_like
from pipeline.data.volume import Volume
from pipeline.figures import (
    caret_xml,
    colour_of,
    hex_colour,
    itksnap_text,
    luminance,
    names_in,
    save_curves,
    slicer_text,
)
from pipeline.review.report.pictures import organ_colours as on_the_page
from website import viewer


def test_colours_of_all_ids_differ_and_neighbours_differ_much() -> None:
    colours = [colour_of(organ_id) for organ_id in range(1, 255)]
    assert len(set(colours)) > 245
    for one, other in pairwise(colours):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 100
    assert all(0 <= c <= 255 for colour in colours for c in colour)
    bright = [luminance((red / 255, green / 255, blue / 255)) for red, green, blue in colours]
    assert min(1.05 / (light + 0.05) for light in bright) > 2.9  # on white paper
    assert min((light + 0.05) / 0.0589 for light in bright) > 2.9  # on the page's dark one, #14181c


def test_one_organ_has_one_colour_in_every_picture_page_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever other organs there are, and in whatever order they are drawn."""
    ids = {"spleen": 2, "kidneys": 3, "aorta": 40}
    wanted = {organ: hex_colour(organ_id) for organ, organ_id in ids.items()}
    names = {organ_id: organ for organ, organ_id in ids.items()}

    def hexed(pattern: str, text: str) -> dict[str, str]:
        found = re.findall(pattern, text, re.MULTILINE)
        return {name: f"#{int(r):02x}{int(g):02x}{int(b):02x}" for r, g, b, name in found}

    assert {names[i]: colour for i, colour in on_the_page(LabelSpace(ids)).items()} == wanted
    snap = r"^ *(?!0 )\d+ +(\d+) +(\d+) +(\d+) .*\"(.*)\"$"
    assert hexed(snap, itksnap_text(names)) == wanted
    rows = [line.split() for line in slicer_text(names, "t.ctbl").splitlines()]
    found = {row[1]: "#" + bytes(map(int, row[2:5])).hex() for row in rows if row[0] != "#"}
    assert {organ: found[organ] for organ in ids} == wanted
    assert hex_colour(255) == "#808080"  # ignored
    share = r'Red="(.*?)" Green="(.*?)" Blue="(.*?)" .*CDATA\[(.*?)\]'
    shares = re.findall(share, caret_xml(names))
    assert {name: to_hex([float(c) for c in rgb]) for *rgb, name in shares} == wanted
    drawn: list[Figure] = []

    def keep(self: Figure, path: Path, **options: object) -> None:
        drawn.append(self)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    dice = {organ: [(1.0, 0.5)] for organ in reversed(ids)}
    save_curves(tmp_path / "progress.png", {}, dice, ids=ids)
    lines = [line for ax in drawn[0].axes for line in ax.get_lines()]
    told = {str(line.get_label()).split()[0]: to_hex(line.get_color()) for line in lines}
    assert {organ: told[organ] for organ in ids} == wanted


def test_names_that_the_formats_cannot_hold_stay_readable() -> None:
    names = {1: 'the "left" kidney', 2: "a]]>b <&>"}
    last = itksnap_text(names).splitlines()[-2]
    assert last.endswith("\"the 'left' kidney\"")
    assert last.count('"') == 2
    assert slicer_text(names, "t.ctbl").splitlines()[3].split()[1] == 'the_"left"_kidney'
    labels = ET.fromstring(caret_xml(names)).iter("Label")
    assert [label.text for label in labels] == ['the "left" kidney', "a]] >b <&>"]


def test_the_label_file_is_what_itksnap_documents(tmp_path: Path) -> None:
    path = tmp_path / "labels.itksnap.txt"
    path.write_text(itksnap_text({1: "liver", 7: "left kidney", 254: "12th rib"}))
    found = viewer.read_itksnap(path)
    assert found[0] == ((0, 0, 0), "Clear Label")
    assert found[7] == (colour_of(7), "left kidney")
    for wrong in ('1 256 0 0 1 1 1 "a"', "1 0 0 0 1 1 1 a", '1 0 0 0 2 1 1 "a"'):
        path.write_text(f"# IDX\n{wrong}\n")
        with pytest.raises(ValueError, match="line 2 is no label description"):
            viewer.read_itksnap(path)


@pytest.mark.slow
def test_itksnap_has_our_names_and_colours_and_the_patients_sides(tmp_path: Path) -> None:
    """Of a CT whose axes run S, L, P. The environment variable ITKSNAP_ROOT names a Debian that has
    the programs (`website/viewer.py`); else they are on PATH."""
    root = Path(named) if (named := os.environ.get("ITKSNAP_ROOT")) else None
    if absent := viewer.missing(root):
        pytest.skip(f"{', '.join(absent)}: not on PATH, nor in a Debian that ITKSNAP_ROOT names")
    stored = np.full((40, 40, 40), -1000, np.int16)
    stored[:4] = 500
    affine = [[0, -5, 0, 90], [0, 0, -5, 80], [5, 0, 0, -70], [0, 0, 0, 1]]
    ct, labels, names = (tmp_path / name for name in ("ct.nii.gz", "map.nii.gz", "names.txt"))
    nib.save(nib.Nifti1Image(stored, np.array(affine, float)), ct)
    grid = read_grid(ct)
    array = np.zeros(grid.shape, np.uint8)  # z, y, x in RAS+
    array[22:30, 12:22, 26:34] = 1
    array[22:30, 12:22, 6:14] = 2
    array[6:14, 20:32, 26:34] = 254
    organs = {1: "liver", 2: 'the "left" kidney', 3: "rein gauche, entier", 254: "vena_cava" * 4}
    write_like(labels, Volume(array, grid), ct, names=organs)
    names.write_text(itksnap_text(organs), "utf-8")
    viewer.draw(ct, labels, names, tmp_path / "seen.png", root)  # names come back the same
    seen = np.round(255 * image.imread(tmp_path / "seen.png")[..., :3]).astype(int)

    def centre(panel: np.ndarray, organ_id: int) -> np.ndarray:
        half = np.array(colour_of(organ_id)) / 2  # over black
        at = np.argwhere((abs(panel - half) < 2).all(axis=-1))
        assert len(at) > 500
        return at.mean(axis=0)

    for organ_id in organs:
        assert (seen[:, 912:] == colour_of(organ_id)).all(axis=-1).sum() > 50
    axial, sagittal, coronal = seen[27:336, 190:524], seen[27:336, 550:884], seen[363:673, 550:884]
    for panel in (axial, coronal):
        assert centre(panel, 1)[1] + 50 < centre(panel, 2)[1]  # the patient's right is on the left
    assert centre(coronal, 1)[0] + 50 < centre(coronal, 254)[0]
    assert centre(sagittal, 254)[1] + 20 < centre(sagittal, 1)[1]  # in front of it


def test_names_are_read_back_and_written_again_the_same() -> None:
    """By this a table is known for one of ours; also after three digits of an id."""
    names = {1: "liver", 7: 'the "left" kidney', 254: "12th rib"}
    snap, slicer = itksnap_text(names), slicer_text(names, "t.ctbl")
    assert names_in(snap) == {1: "liver", 7: "the 'left' kidney", 254: "12th rib"}
    assert names_in(slicer) == {1: "liver", 7: 'the_"left"_kidney', 254: "12th_rib"}
    assert itksnap_text(names_in(snap)) == snap
    assert slicer_text(names_in(slicer), "t.ctbl") == slicer
    assert names_in("# IDX -R- 1 2 3\nliver 1 2 3 4\n\n1 2\n") == {}
