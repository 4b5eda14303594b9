"""A label map as DICOM SEG, beside the series that it is of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import versions
from pipeline.data.dicom import not_installed, read_headers
from pipeline.errors import GeometryError

_MAKER = "organ-distill"
_SIDES = {"left", "right"}


def write_segmentation(
    path: Path,
    labels: Path,
    series: Path,
    ids: Mapping[str, int],
    colours: Mapping[str, tuple[int, int, int]],
) -> bool:
    """Writes a label map as a DICOM Segmentation (binary segments) that refers to its series;
    False of an empty one, for which there is no such file.

    Organs are coded in SNOMED CT where pydicom's dictionary has their names (`kidney_left` is a
    kidney with its side), others in a private scheme. As the standard asks, patient and study are
    copied from the series into this file.

    Args:
        labels: a NIfTI in the geometry of the series, as `predict` writes it.
        ids: organ -> value in the label map; organs without a voxel get no segment.
        colours: organ -> red, green, blue, 0 .. 255.

    Raises:
        GeometryError: a series whose headers lack what a SEG repeats, or highdicom is not
            installed.
    """
    import nibabel as nib

    there, sources = read_headers(series)
    for header in sources:  # it may be empty, and highdicom wants it
        if not header.get("SliceThickness"):
            header.SliceThickness = round(float(np.linalg.norm(there.affine[:3, 2])), 4)
    image: Any = nib.load(labels)
    # The sources follow each other along z, the frames of one as they lie in it.
    order = sorted(range(len(there.slices)), key=lambda z: there.slices[z].frame or 0)
    planes = np.asarray(image.dataobj).T[order]
    shown = [organ for organ, value in ids.items() if (planes == value).any()]
    if not shown:
        return False
    segments = np.zeros(planes.shape, dtype=np.uint8)
    for number, organ in enumerate(shown, 1):
        segments[planes == ids[organ]] = number
    try:
        from highdicom.seg import Segmentation
        from pydicom.uid import generate_uid

        made = Segmentation(
            source_images=sources, pixel_array=segments, segmentation_type="BINARY",
            segment_descriptions=[_segment(k, o, colours[o]) for k, o in enumerate(shown, 1)],
            series_instance_uid=generate_uid(), sop_instance_uid=generate_uid(),
            series_number=1000 + int(sources[0].get("SeriesNumber") or 0), instance_number=1,
            manufacturer=_MAKER, manufacturer_model_name=_MAKER,
            software_versions=versions()[_MAKER] or "0", device_serial_number="0",
            content_label="ORGANS",
        )  # fmt: skip
    except ImportError as error:
        raise not_installed("highdicom is not installed, which writes DICOM SEG", series) from error
    except (AttributeError, ValueError, TypeError) as error:
        raise GeometryError(
            f"no DICOM SEG can refer to this series ({error}).",
            where=series,
            fix="Its headers lack what the standard asks for: export it again.",
        ) from error
    made.save_as(path)
    return True


def _segment(number: int, organ: str, colour: tuple[int, int, int]) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    family = codes.DCM.ArtificialIntelligence
    kind, side = _coded(organ)
    made = SegmentDescription(
        number, organ, codes.SCT.Organ, kind, "AUTOMATIC",
        AlgorithmIdentificationSequence(_MAKER, family, versions()[_MAKER] or "0"),
        display_color=CIELabColor.from_rgb(*colour),
    )  # fmt: skip
    if side is not None:
        made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
    return made


def _coded(organ: str) -> tuple[Any, Any]:
    """An organ's code and that of its side, if its name has one."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    words = re.split(r"[^a-z]+", organ.lower())
    sides = [word for word in words if word in _SIDES]
    name = "".join(word.title() for word in words if word not in _SIDES)
    for known in (name, name.removesuffix("s"), f"{name}Structure"):
        if (code := getattr(codes.SCT, known, None)) is not None:
            break
    else:  # a code has at most 16 characters
        value = hashlib.sha256(organ.encode()).hexdigest()[:16]
        return CodedConcept(value, "99ORGANDISTILL", organ[:64]), None
    side = CodedConcept.from_code(getattr(codes.SCT, sides[0].title())) if sides else None
    return code, side
