"""A bundle's config runs nothing but what is on the list, unless the user trusts the teacher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TeacherError
from tests.unit.teachers.made_bundles import NETWORK, transform, write_bundle
from tests.unit.teachers.test_monai_bundle import load, refused

Data = dict[str, Any]


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whoever imports `trap` or calls one of its functions leaves this file behind."""
    path = tmp_path / "ran"
    (tmp_path / "trap.py").write_text(
        "from pathlib import Path\n"
        f"def spring(*args, **kwargs):\n    Path({str(path)!r}).touch()\n"
        "spring()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    return path


def in_network(value: object) -> Callable[[Data], object]:
    return lambda config: config["network_def"].update(dropout=value)


CODE: dict[str, tuple[Callable[[Data], object], str]] = {
    "expression": (in_network("$__import__('trap').spring()"), "network_def::dropout: \\$__import"),
    "target": (in_network({"_target_": "trap.spring"}), "network_def::dropout: _target_ trap"),
    "expression as target": (
        lambda config: config["network_def"].update(_target_="$__import__('trap').spring"),
        "network_def: _target_ \\$",
    ),
    "by reference": (
        lambda config: (
            config.update({"rate": "@deeper::0", "deeper": ["$__import__('trap').spring()"]})
            or in_network("@rate")(config)
        ),
        "deeper::0: \\$",
    ),
    "by macro": (
        lambda config: (
            config.update(rate=["$__import__('trap').spring()"]) or in_network("%rate::0")(config)
        ),
        "network_def::dropout: \\$|rate::0: \\$",
    ),
    "written out": (in_network("$'$import trap'"), "network_def::dropout: \\$import trap"),
    "inside an expression": (in_network("$[__import__('trap'), 1]"), "network_def::dropout"),
    "requires": (
        lambda config: config["network_def"].update(_requires_=["$import trap"]),
        "network_def::_requires_::0",
    ),
    "inferer": (
        lambda config: config.update(
            inferer={"_target_": "PatchInferer", "merger_cls": "trap.spring"}
        ),
        "inferer: _target_ PatchInferer",
    ),
    "transform": (
        lambda config: config["preprocessing"]["transforms"].append(
            {"_target_": "Lambdad", "keys": "image", "func": {"_target_": "trap.spring"}}
        ),
        "transforms::6: _target_ Lambdad.*func: _target_ trap",
    ),
    "reader": (
        lambda config: transform(config, "LoadImaged").update(reader="trap.spring"),
        "transforms::0: reader trap.spring",
    ),
    "out of an allowed module": (
        in_network({"_target_": "monai.networks.nets.unet.warnings.warn", "message": "x"}),
        "_target_ monai.networks.nets.unet.warnings.warn",
    ),
    "a function of MONAI": (
        in_network({"_target_": "download_url", "url": "http://localhost/x"}),
        "_target_ download_url",
    ),
    "a debugger": (lambda config: config["network_def"].update(_mode_="debug"), "_mode_"),
    "a download": (lambda config: config["network_def"].update(pretrained=True), "pretrained"),
}


@pytest.mark.parametrize("how", CODE)
def test_a_config_that_would_run_code(tmp_path: Path, marker: Path, how: str) -> None:
    change, place = CODE[how]
    message = refused(write_bundle(tmp_path / "bundle", change), f"would run code: .*{place}")
    assert "--trust" in message
    assert not marker.exists()


@pytest.mark.parametrize("how", ["expression", "target", "by reference", "by macro", "reader"])
def test_the_traps_are_armed(tmp_path: Path, marker: Path, how: str) -> None:
    """Who trusts the bundle runs them; what comes of it is the bundle's affair."""
    folder = write_bundle(tmp_path / "bundle", CODE[how][0])
    with suppress(TeacherError):
        load(folder, trusted=True)
    assert marker.exists()


def test_all_places_are_named_at_once(tmp_path: Path) -> None:
    def two(config: Data) -> None:
        in_network("$1 + 1")(config)
        config["inferer"]["overlap"] = "$max(0.1, 0.5)"

    message = refused(write_bundle(tmp_path / "bundle", two), "network_def::dropout: \\$1 \\+ 1")
    assert "inferer::overlap: $max(0.1, 0.5)" in message


def test_parts_that_are_not_needed_may_hold_anything(tmp_path: Path, marker: Path) -> None:
    """The typical bundle of the model zoo is full of expressions, and loads without trust."""

    def elsewhere(config: Data) -> None:
        config["imports"] = ["$import trap"]
        config["initialize"] = ["$__import__('trap').spring()"]
        config["training"] = {"_target_": "trap.spring", "rate": 0.25}
        in_network("@training::rate")(config)

    teacher = load(write_bundle(tmp_path / "bundle", elsewhere))
    assert not marker.exists()
    assert "0.25" in str(teacher.parts.network)


def test_expressions_that_only_write_out_a_value(tmp_path: Path) -> None:
    """As in wholeBody_ct_segmentation, which chooses its spacing so."""

    def choose(config: Data) -> None:
        config["displayable_configs"] = {"highres": True, "overlap": 0.25}
        config["pixdim"] = "$[6, 6, 8] if @displayable_configs#highres else [9.0, 9.0, 9.0]"
        transform(config, "Spacingd")["pixdim"] = "@pixdim"
        transform(config, "EnsureTyped")["dtype"] = "$torch.float32"
        config["inferer"]["overlap"] = "$@displayable_configs#overlap"
        config["inferer"]["device"] = "$torch.device('cuda:0')"
        config["network_def"].update(dropout="$-0.0", bias="$not False")

    teacher = load(write_bundle(tmp_path / "bundle", choose))
    assert teacher.parts.inferer.overlap == 0.25
    assert str(teacher.parts.inferer.device) == "cpu"
    spacing = teacher.parts.preprocessing.transforms[3].spacing_transform
    assert list(spacing.pixdim) == [6, 6, 8]


def test_references_macros_and_full_names(tmp_path: Path) -> None:
    def spread(config: Data) -> None:
        config["sizes"] = {"channels": NETWORK["channels"], "roi": [16, 24, 8]}
        config["network_def"] |= {
            "_target_": "monai.networks.nets.UNet",
            "channels": "%sizes::channels",
            "act": ["LeakyReLU", {"negative_slope": 0.25}],
        }
        config["inferer"]["roi_size"] = "@sizes::roi"
        transform(config, "LoadImaged")["reader"] = "NibabelReader"

    folder = write_bundle(tmp_path / "bundle", spread)
    with pytest.raises(TeacherError, match="do not fit"):  # PReLU had weights
        load(folder)
    assert "trust" not in refused(folder, "do not fit")


@pytest.mark.parametrize("part", ["network_def", "preprocessing", "inferer"])
def test_a_part_that_is_not_there(tmp_path: Path, part: str) -> None:
    refused(write_bundle(tmp_path / "bundle", lambda config: config.pop(part)), f"no {part}")


def test_references_to_what_is_not_there(tmp_path: Path) -> None:
    for number, text in enumerate(("@nowhere", "@network_def::nowhere", "%nowhere", "@imports::9")):
        folder = write_bundle(tmp_path / str(number), in_network(text))
        refused(folder, "which is not there")


def test_a_reference_to_itself(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", in_network("@network_def"))
    refused(folder, "circular")


def test_values_from_another_file(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", in_network("%/etc/other.json::x"))
    refused(folder, "takes its value from another file")


def test_arguments_that_the_network_does_not_take(tmp_path: Path) -> None:
    change: Callable[[Data], object] = lambda c: c["network_def"].update(colour=1)  # noqa: E731
    refused(write_bundle(tmp_path / "bundle", change), "cannot be resolved .*colour")


def test_a_part_that_is_something_else(tmp_path: Path) -> None:
    def swapped(config: Data) -> None:
        config["network_def"] = {"_target_": "SimpleInferer"}

    refused(write_bundle(tmp_path / "bundle", swapped), "network_def is no network")


def test_a_trusted_bundle_runs_as_monai_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_code(config: Data) -> None:
        config["imports"].append("$import my_network")
        config["network_def"] = {"_target_": "my_network.make", "root": "@bundle_root"}

    (tmp_path / "my_network.py").write_text(
        "from tests.unit.teachers.made_bundles import seeded_network\n"
        "def make(root):\n"
        "    assert root.endswith('bundle')\n"
        "    return seeded_network()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = write_bundle(tmp_path / "bundle", own_code)
    refused(folder, "_target_ my_network.make")
    load(folder, trusted=True)
