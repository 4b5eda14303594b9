"""Names and colours of a label map, as the programs that show label maps read them."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping

Colour = tuple[int, int, int]

_GOLDEN_RATIO = 0.618033988749895
_RULE = "#" * 48
_ROW = re.compile(
    r'^ *(?P<id>\d+) +(?:(?P<bare>\S+)(?: +\d+){4}|(?: +[\d.]+){6} +"(?P<quoted>.*)") *$',
    re.MULTILINE,
)


def colour_of(organ_id: int) -> Colour:
    """Red, green and blue, 0 .. 255, of an organ id: the same in every file and every run.

    Hues a golden ratio apart are never close for ids that are, however many there are.
    """
    hue = (0.02 + (organ_id - 1) * _GOLDEN_RATIO) % 1.0
    value = (0.95, 0.75)[(organ_id // 7) % 2]
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.72, value))
    return red, green, blue


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
