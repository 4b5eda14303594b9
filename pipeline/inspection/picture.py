"""One case as a figure: three planes through its organs, a column per question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.cache.reader import CachedCase
from pipeline.figures import BACKGROUND_COLOUR, Marked, Panel, save_planes
from pipeline.inspection.looks import CaseLook
from pipeline.inspection.maps import CaseMaps, organ_colours
from pipeline.inspection.measure import CaseNumbers
from pipeline.inspection.voxels import BOTH, FALSE_POSITIVE, MISS

_ONE_OR_MORE = tuple(range(1, 256))
CONFLICT_COLOUR = "#d50000"
ABSTAINED_COLOUR = "#ffffff"
FALSE_POSITIVE_COLOUR = "#76ff03"
MISS_COLOUR = "#d500f9"
SPLIT_COLOUR = "#00b0ff"


def draw_case(
    path: Path, case: CachedCase, look: CaseLook, found: CaseMaps, numbers: CaseNumbers
) -> None:
    """Writes a PNG.

    Args:
        path: of the figure.
        case: the case.
        look: at it.
        found: its maps.
        numbers: its volumes, which the legend gives.
    """
    organs = organ_colours(look)
    ids = dict(zip(look.organs, look.ids, strict=True))
    label = {o: Marked(found.label, (ids[o],)) for o in look.organs if o in case.annotated}
    regions = {o: Marked(found.maps["regions"], (i,)) for o, i in ids.items()}
    against = found.maps["against_label"]
    disagreement = {
        "false positive": Marked(against, (FALSE_POSITIVE, BOTH)),
        "miss": Marked(against, (MISS, BOTH)),
    }
    if "split_experts" in found.maps:
        disagreement["split experts"] = Marked(found.maps["split_experts"], _ONE_OR_MORE)
    panels = [
        Panel("CT", {}),
        Panel(f"label ({', '.join(label) or 'none'})", label),
        Panel("organ regions", regions),
        Panel(
            "agreed background",
            {"agreed background": Marked(found.maps["agreed_background"], (1,))},
        ),
        Panel(
            "conflict, abstained",
            {
                "conflict": Marked(found.maps["conflicts"], _ONE_OR_MORE),
                "abstained": Marked(found.maps["abstained"], (1,)),
            },
        ),
        Panel("teachers against label", disagreement),
    ]
    colours = {
        **organs,
        "agreed background": BACKGROUND_COLOUR,
        "conflict": CONFLICT_COLOUR,
        "abstained": ABSTAINED_COLOUR,
        "false positive": FALSE_POSITIVE_COLOUR,
        "miss": MISS_COLOUR,
        "split experts": SPLIT_COLOUR,
    }
    view = look.view
    wins = "labels win" if view.labels_win else "labels do not win"
    heat = ", calibrated" if view.temperatures else ""
    save_planes(
        path,
        found.image,
        panels,
        case.grid.spacing_mm,
        colours=colours,
        legend=_legend(numbers, colours, disagreement),
        title=f"{case.name} ({case.split}): margin {view.margin:g}, {wins}{heat}",
        notes=numbers.flags,
    )


def _legend(
    numbers: CaseNumbers, colours: Mapping[str, str], shown: Mapping[str, object]
) -> dict[str, str]:
    """Name -> what the legend says of it."""
    organs = numbers.organs
    words = {name: f"{name} {numbers.organs[name].region_ml:.0f} ml" for name in organs}
    words["agreed background"] = f"agreed background {numbers.agreed_background:.1%}"
    words["conflict"] = f"conflict {numbers.conflict_ml:.1f} ml"
    words["abstained"] = f"abstained {numbers.abstained_ml:.1f} ml"
    false = sum(n.false_positive_ml or 0.0 for n in organs.values())
    missed = sum(n.missed_ml or 0.0 for n in organs.values())
    split = sum(n.split_ml or 0.0 for n in organs.values())
    words["false positive"] = f"teacher says organ, label says not: {false:.1f} ml"
    words["miss"] = f"label says organ, its teacher does not: {missed:.1f} ml"
    words["split experts"] = f"experts of one organ differ: {split:.1f} ml"
    return {n: words[n] for n in colours if n in words and (n != "split experts" or n in shown)}
