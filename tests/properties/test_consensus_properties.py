from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.cache.reader import CachedCase, Trust
from pipeline.consensus.cohort import RegionRules, compute, known_organs, lazy_consensus, lazy_patch
from pipeline.consensus.regions import (
    Consensus,
    above,
    average_experts,
    consensus,
    excluded_by_label,
    pair_conflicts,
    spoken_below,
)
from pipeline.data.labels import IGNORE
from pipeline.data.patches import Patch
from tests.unit.consensus.slow_consensus import (
    slow_average,
    slow_excluded,
    slow_labels_win,
    slow_pair_conflicts,
    slow_regions,
)
from tests.unit.review.inspect.made_cases import SPACE, made_case, random_case

NAMES = ("log_odds", "organ", "background", "conflict", "abstained")
Array = npt.NDArray[Any]

votes = st.one_of(st.just(0.0), st.just(float("nan")), st.floats(-30, 30, width=16))
seen_votes = st.floats(-30, 30, width=16).filter(lambda v: v != 0)
margins = st.sampled_from([0.0, 0.5, 2.0])


@st.composite
def scenes(draw: st.DrawFn, elements: st.SearchStrategy[float] = votes) -> Any:
    """Log-odds (K, D, H, W), classes (D, H, W), annotated organs."""
    num_organs = draw(st.integers(1, 4))
    shape = draw(st.tuples(*(st.integers(1, 4) for _ in range(3))))
    odds = draw(hnp.arrays(np.float16, (num_organs, *shape), elements=elements))
    annotated = sorted(draw(st.sets(st.integers(0, num_organs - 1))))
    values = st.sampled_from([0, 255, *(k + 1 for k in annotated)])
    classes = draw(hnp.arrays(np.uint8, shape, elements=values))
    return odds, classes, annotated


@st.composite
def chunkings(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    per_axis = []
    for size in shape:
        cuts = sorted(draw(st.sets(st.integers(1, size - 1)))) if size > 1 else []
        ends = [0, *cuts, size]
        per_axis.append(tuple(b - a for a, b in pairwise(ends)))
    return tuple(per_axis)


def computed(found: Consensus) -> dict[str, Array]:
    arrays = da.compute(*(getattr(found, name) for name in NAMES), scheduler="synchronous")
    return dict(zip(NAMES, arrays, strict=True))


def regions(
    odds: Array, classes: Array | None = None, annotated: Any = (), **options: Any
) -> dict[str, Array]:
    lazy = None if classes is None else da.from_array(classes)
    return computed(consensus(da.from_array(odds), lazy, annotated, **options))


@settings(max_examples=50, deadline=None)
@given(scenes(), margins, st.sampled_from([0.5, 6.0]))
def test_the_obvious_version_says_the_same(scene: Any, margin: float, confidence: float) -> None:
    odds, classes, annotated = scene
    corrected = slow_labels_win(odds, classes, annotated, confidence) if annotated else odds
    wanted = {"log_odds": corrected, **slow_regions(corrected, margin)}
    found = regions(odds, classes, annotated, margin=margin, confidence=confidence)
    for name in NAMES:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_chunking_says_the_same(data: st.DataObject) -> None:
    odds, classes, annotated = data.draw(scenes())
    whole = regions(odds, classes, annotated, margin=0.5)
    lazy = da.from_array(odds, chunks=data.draw(chunkings(odds.shape)))
    label = da.from_array(classes, chunks=data.draw(chunkings(classes.shape)))
    cut = computed(consensus(lazy, label, annotated, margin=0.5))
    for name in NAMES:
        np.testing.assert_array_equal(cut[name], whole[name], err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.data())
def test_averages_do_not_depend_on_chunks(which: list[int], data: st.DataObject) -> None:
    shape = (3, 4, 2)
    experts = [data.draw(hnp.arrays(np.float16, shape, elements=votes)) for _ in which]
    lazy = [da.from_array(e, chunks=data.draw(chunkings(shape))) for e in experts]
    average = average_experts(lazy).compute(scheduler="synchronous")
    np.testing.assert_allclose(average, slow_average(experts), rtol=1e-6, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(scenes(), margins)
def test_every_voxel_is_in_an_organ_or_background_or_abstained(scene: Any, margin: float) -> None:
    odds, classes, annotated = scene
    found = regions(odds, classes, annotated, margin=margin)
    parts = np.stack([found["organ"].any(axis=0), found["background"], found["abstained"]])
    assert np.all(parts.sum(axis=0) == 1)
    assert not np.any(found["conflict"] & ~found["organ"].any(axis=0))


@settings(max_examples=40, deadline=None)
@given(scenes(seen_votes))
def test_with_no_margin_and_all_seen_nothing_abstains(scene: Any) -> None:
    odds, classes, annotated = scene
    assert not regions(odds, classes, annotated, margin=0)["abstained"].any()


@settings(max_examples=40, deadline=None)
@given(scenes(), st.floats(0, 10), st.floats(0, 10))
def test_a_wider_margin_only_takes_voxels_away(scene: Any, a: float, b: float) -> None:
    odds, classes, annotated = scene
    narrow = regions(odds, classes, annotated, margin=min(a, b))
    wide = regions(odds, classes, annotated, margin=max(a, b))
    for name in ("organ", "background", "conflict"):
        assert not np.any(wide[name] & ~narrow[name]), name
    assert not np.any(narrow["abstained"] & ~wide["abstained"])


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_where_the_label_speaks_it_is_never_contradicted(scene: Any) -> None:
    odds, classes, annotated = scene
    organ = regions(odds, classes, annotated)["organ"]
    for k in annotated:
        assert np.array_equal(organ[k][classes != 255], (classes == k + 1)[classes != 255])
    inside = np.isin(classes, [k + 1 for k in annotated])
    assert np.all(organ[:, inside].sum(axis=0) == 1)


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_what_a_label_excludes(scene: Any) -> None:
    odds, classes, annotated = scene
    found = excluded_by_label(da.from_array(classes), annotated, len(odds))
    wanted = slow_excluded(classes, annotated, len(odds))
    np.testing.assert_array_equal(found.compute(scheduler="synchronous"), wanted)
    corrected = regions(odds, classes, annotated)["organ"]
    assert not np.any(corrected & wanted), "labels that win leave no region where they exclude it"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=6, unique=True),
    st.integers(0, 99),
    st.data(),
)
def test_conflicts_of_each_pair_of_teachers(
    channels: list[tuple[str, int]], seed: int, data: st.DataObject
) -> None:
    claims = np.random.default_rng(seed).random((len(channels), 3, 2, 4)) < 0.5
    teachers, organs = [t for t, _ in channels], [k for _, k in channels]
    chunks = data.draw(chunkings(claims.shape)) if channels else claims.shape
    pairs, counts = pair_conflicts(da.from_array(claims, chunks=chunks), teachers, organs)
    found = dict(zip(map(frozenset, pairs), counts.compute(scheduler="synchronous"), strict=True))
    assert found == slow_pair_conflicts(claims, teachers, organs)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> CachedCase:
    folder = tmp_path_factory.mktemp("stored")
    _, votes, label = random_case(folder / "one")
    label = np.random.default_rng(1).choice([0, *SPACE.ids.values(), IGNORE], size=label.shape)
    return made_case(folder / "two", "made/case", votes, label, SPACE.organs)


@st.composite
def variants(draw: st.DrawFn, stored: CachedCase) -> tuple[CachedCase, RegionRules]:
    """A case of which some teachers are missing and some not believed, and rules."""
    pairs = [(t, o) for o, who in stored.experts.items() for t in who]
    left = draw(st.sets(st.sampled_from(sorted(stored.teachers))))
    case = replace(
        stored,
        annotated=tuple(o for o in SPACE.organs if draw(st.booleans())),
        teachers={name: unit for name, unit in stored.teachers.items() if name in left},
        experts={o: [t for t in who if t in left] for o, who in stored.experts.items()},
        trust={
            pair: Trust(draw(st.booleans()), draw(st.booleans()))
            for pair in pairs
            if draw(st.booleans())
        },
    )
    rules = RegionRules(
        margin=draw(margins),
        labels_win=draw(st.booleans()),
        confidence=draw(st.sampled_from([0.5, 6.0])),
        temperatures={pair: draw(st.floats(0.25, 16)) for pair in pairs if draw(st.booleans())},
    )
    return case, rules


def cut(values: Array, patch: Patch, fill: float) -> Array:
    """A patch of a whole case's array; `fill` outside."""
    inside, missing = patch.clip(values.shape[-3:])
    padding = [(0, 0)] * (values.ndim - 3) + list(missing)
    part: Array = np.pad(values[(..., *inside)], padding, constant_values=fill)
    return part


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_patch_says_bit_for_bit_what_the_case_says_there(
    stored: CachedCase, data: st.DataObject
) -> None:
    case, rules = data.draw(variants(stored))
    start = data.draw(st.tuples(*(st.integers(-4, n) for n in case.label().shape)))
    patch = Patch(start, data.draw(st.tuples(*(st.integers(1, 8) for _ in range(3)))))
    classes = SPACE.to_classes(case.label(patch, fill=IGNORE))
    (d,) = compute(lazy_patch(case, SPACE, rules, patch, classes))
    organ, background = above(d, rules.margin), spoken_below(d, rules.margin)
    known = known_organs(case, SPACE, labels_win=rules.labels_win)
    if known:
        whole, _ = lazy_consensus(case, SPACE, rules)
        parts = compute(whole.log_odds, whole.organ, whole.unclaimed)
        fills = (np.nan, False, False)
        wanted = [cut(a, patch, fill) for a, fill in zip(parts, fills, strict=True)]
        assert (
            np.nan_to_num(d[known], nan=99).tobytes() == np.nan_to_num(wanted[0], nan=99).tobytes()
        )
        assert np.array_equal(organ[known], wanted[1])
        assert np.array_equal(background, wanted[2])
    unknown = [k for k in range(len(SPACE.organs)) if k not in known]
    assert d.dtype == np.float32
    assert np.isnan(d[unknown]).all()
    assert not organ[unknown].any()
    assert background.any() <= bool(known)
