"""What a teacher's entry says beside its channels: from its files, or from the user's flag."""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import ConfigError
from pipeline.layouts.teachers import FoundTeacher

_NUMBER = r"-?\d+(?:\.\d+)?"
_SPACING = re.compile(rf"({_NUMBER})x({_NUMBER})x({_NUMBER})")
_WINDOW = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


def settings_of(
    found: FoundTeacher, parts: dict[str, str], *, where: str
) -> tuple[dict[str, Any], list[str]]:
    """Takes `activation`, `spacing`, `orientation` and `window` out of a flag's parts.

    Returns:
        further keys of the teacher's entry, and what is not known, in words for the user.

    Raises:
        ConfigError: a setting that cannot be read, or that this kind does not take.
    """
    given = {
        key: parts.pop(key)
        for key in ("activation", "spacing", "orientation", "window")
        if key in parts
    }
    settings = dict(found.settings)
    unknown = []
    allowed = set(given) if found.kind == "exported" else {"activation"}
    for key, text in given.items():
        if key not in allowed or (key == "activation" and settings.get(key, text) != text):
            raise ConfigError(
                f"{key}={text} is not for this teacher of kind {found.kind}: its own files say it.",
                where=where,
                fix="Leave it out.",
            )
        settings.update(_setting(key, text, where))
    if found.kind == "exported":
        wanted = {
            "spacing": "spacing_mm",
            "orientation": "orientation",
            "window": "intensity",
            "activation": "activation",
        }
        lacking = [key for key, name in wanted.items() if name not in settings]
        if lacking:
            unknown.append(
                f"{where}: an exported file does not say {', '.join(lacking)}. Add to the flag, "
                "as it was trained, for example "
                "spacing=1.5x1.5x1.5,orientation=RAS,window=-160..240,activation=softmax "
                "(z, y, x in mm; HU window scaled to -1 .. 1)."
            )
    if found.kind == "monai-bundle" and "activation" not in settings:
        unknown.append(
            f"{where}: its config does not say whether outputs go through softmax or sigmoid. Add "
            "activation=softmax or activation=sigmoid to the flag."
        )
    return settings, unknown


def _setting(key: str, text: str, where: str) -> dict[str, Any]:
    if key == "activation" and text in ("softmax", "sigmoid"):
        return {"activation": text}
    if key == "orientation" and text.isalpha():
        return {"orientation": text}
    if key == "spacing" and (match := _SPACING.fullmatch(text)):
        return {"spacing_mm": [float(number) for number in match.groups()]}
    if key == "window" and (match := _WINDOW.fullmatch(text)):
        hu = [float(number) for number in match.groups()]
        return {"intensity": {"kind": "window", "window_hu": hu}}
    raise ConfigError(
        f"{key}={text} cannot be read.",
        where=where,
        fix="Write activation=softmax, spacing=1.5x1.5x1.5, orientation=RAS, window=-160..240.",
    )
