from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

from pipeline.label_tables import caret_xml, colour_of, itksnap_text, names_in, slicer_text


def test_colours_of_all_ids_differ_and_neighbours_differ_much() -> None:
    colours = [colour_of(organ_id) for organ_id in range(1, 255)]
    assert len(set(colours)) > 245
    for one, other in pairwise(colours):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 100
    assert all(0 <= c <= 255 for colour in colours for c in colour)


def test_names_that_the_formats_cannot_hold_stay_readable() -> None:
    names = {1: 'the "left" kidney', 2: "a]]>b <&>"}
    last = itksnap_text(names).splitlines()[-2]
    assert last.endswith("\"the 'left' kidney\"")
    assert last.count('"') == 2
    assert slicer_text(names, "t.ctbl").splitlines()[3].split()[1] == 'the_"left"_kidney'
    labels = ET.fromstring(caret_xml(names)).iter("Label")
    assert [label.text for label in labels] == ['the "left" kidney', "a]] >b <&>"]


def test_names_are_read_back_and_written_again_the_same() -> None:
    """By this a table is known for one of ours; also after three digits of an id."""
    names = {1: "liver", 7: 'the "left" kidney', 254: "12th rib"}
    snap, slicer = itksnap_text(names), slicer_text(names, "t.ctbl")
    assert names_in(snap) == {1: "liver", 7: "the 'left' kidney", 254: "12th rib"}
    assert names_in(slicer) == {1: "liver", 7: 'the_"left"_kidney', 254: "12th_rib"}
    assert itksnap_text(names_in(snap)) == snap
    assert slicer_text(names_in(slicer), "t.ctbl") == slicer
    assert names_in("# IDX -R- 1 2 3\nliver 1 2 3 4\n\n1 2\n") == {}
