"""Names and colours of a label map, as the programs that show label maps read them."""

from __future__ import annotations

import colorsys
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

Colour = tuple[int, int, int]

_GOLDEN_RATIO = 0.618033988749895
_RULE = "#" * 48
# Of the first ids; all are as far from white paper as from the page's dark one and black air.
_FIRST = (
    "e6550d", "3182bd", "31a354", "b8860b", "8e44ad", "0097a7", "d81b60", "827717", "5c6bc0",
    "8d6e63",
)  # fmt: skip
_LIGHTEST, _DARKEST = 0.3, 0.125  # relative luminance (WCAG): 3:1 against white and the dark page
_WHITER = 0.2


_ROW = re.compile(
    r'^ *(?P<id>\d+) +(?:(?P<bare>\S+)(?: +\d+){4}|(?: +[\d.]+){6} +"(?P<quoted>.*)") *$',
    re.MULTILINE,
)


def colour_of(organ_id: int) -> Colour:
    """Red, green and blue, 0 .. 255, of an organ id: the same in every file, picture, page and run.

    Behind the first ids, hues a golden ratio apart are never close for ids that are.
    """
    if organ_id <= len(_FIRST):
        red, green, blue = bytes.fromhex(_FIRST[organ_id - 1])
        return red, green, blue
    hue = (0.02 + (organ_id - 1) * _GOLDEN_RATIO) % 1.0
    value = (0.95, 0.75)[(organ_id // 7) % 2]
    rgb = colorsys.hsv_to_rgb(hue, 0.72, value)
    bright = luminance(rgb)
    too_light = max(1.0, bright / _LIGHTEST) ** (1 / 2.2)
    white = _WHITER if bright < _DARKEST else 0.0
    red, green, blue = (round(255 * (white + (1 - white) * c / too_light)) for c in rgb)
    return red, green, blue


def hex_colour(organ_id: int) -> str:
    """`colour_of` as `#rrggbb`."""
    return "#" + bytes(colour_of(organ_id)).hex()


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance (WCAG) of red, green and blue, 0 .. 1, in sRGB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def itksnap_text(names: Mapping[int, str]) -> str:
    """An ITK-SNAP label description file: Segmentation > Import Label Descriptions.

    Args:
        names: organ id -> name.
    """
    lines = [
        _RULE,
        "# ITK-SnAP Label Description File",
        "# File format:",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        "# Fields:",
        "#    IDX:   Zero-based index",
        "#    -R-:   Red color component (0..255)",
        "#    -G-:   Green color component (0..255)",
        "#    -B-:   Blue color component (0..255)",
        "#    -A-:   Label transparency (0.00 .. 1.00)",
        "#    VIS:   Label visibility (0 or 1)",
        "#    IDX:   Label mesh visibility (0 or 1)",
        "#  LABEL:   Label description",
        _RULE,
        '    0     0    0    0        0  0  0    "Clear Label"',
    ]
    for organ_id, name in sorted(names.items()):
        red, green, blue = colour_of(organ_id)
        quoted = name.replace('"', "'")
        lines.append(f'{organ_id:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{quoted}"')
    return "\n".join(lines) + "\n"


def slicer_text(names: Mapping[int, str], file_name: str) -> str:
    """A 3D Slicer colour table; names may hold no blanks there, so these become `_`.

    Args:
        names: organ id -> name.
        file_name: of the table; Slicer's own first line.
    """
    lines = [
        f"# Color table file {file_name}",
        f"# {len(names) + 1} values",
        "0 background 0 0 0 0",
    ]
    for organ_id, name in sorted(names.items()):
        red, green, blue = colour_of(organ_id)
        lines.append(f"{organ_id} {'_'.join(name.split())} {red} {green} {blue} 255")
    return "\n".join(lines) + "\n"


def names_in(table: str) -> dict[int, str]:
    """Organ id -> name as it stands in a table of ITK-SNAP or 3D Slicer; none of background."""
    rows = _ROW.finditer(table)
    found = {int(row["id"]): row["quoted"] or row["bare"] for row in rows}
    return {organ_id: name for organ_id, name in found.items() if organ_id}


def caret_xml(names: Mapping[int, str]) -> str:
    """The label table that TotalSegmentator writes into a NIfTI header extension, and reads.

    Its reader takes `CaretExtension / VolumeInformation / LabelTable / Label` of the first
    extension; that table is in the format of the Caret programs.

    Args:
        names: organ id -> name.
    """
    labels = []
    for organ_id, name in sorted(names.items()):
        red, green, blue = (f"{c / 255:.4f}" for c in colour_of(organ_id))
        text = name.replace("]]>", "]] >")
        labels.append(
            f'<Label Key="{organ_id}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1">'
            f"<![CDATA[{text}]]></Label>"
        )
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            '<CaretExtension><VolumeInformation Index="0"><LabelTable>',
            *labels,
            "</LabelTable><VolumeType><![CDATA[Label]]></VolumeType>",
            "</VolumeInformation></CaretExtension>",
        ]
    )


def caret_names(text: bytes) -> dict[int, str]:
    """The inverse of `caret_xml`: label value -> name; empty for what is no such table."""
    try:
        labels = list(ET.fromstring(text.strip(b"\0 \n")).iter("Label"))
        return {int(label.attrib["Key"]): (label.text or "").strip() for label in labels}
    except (ET.ParseError, KeyError, ValueError):
        return {}
