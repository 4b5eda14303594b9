"""What a teacher's entry says beside its channels: from its files, or from the user's flag."""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import ConfigError
from pipeline.layouts.meanings import Ask
from pipeline.layouts.teachers import FoundTeacher

_NUMBER = r"-?\d+(?:\.\d+)?"
_SPACING = re.compile(rf"({_NUMBER})x({_NUMBER})x({_NUMBER})")
_WINDOW = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


_EXAMPLES = {
    "activation": "softmax or sigmoid",
    "spacing": "1.5x1.5x1.5, z y x in mm, of what it was trained at",
    "orientation": "RAS, where the axes of its array point to, the first axis first",
    "window": "-160..240, the HU that it saw as -1 and as 1",
}
_FIELDS = {
    "activation": "activation",
    "spacing": "spacing_mm",
    "orientation": "orientation",
    "window": "intensity",
}


def settings_of(
    found: FoundTeacher, parts: dict[str, str], *, ask: Ask | None, where: str
) -> tuple[dict[str, Any], list[str]]:
    """Takes `activation`, `spacing`, `orientation` and `window` out of a flag's parts.

    Args:
        found: what its files say.
        parts: of the flag; what is used is taken out.
        ask: puts a question to the user, or None.
        where: for errors.

    Returns:
        further keys of the teacher's entry, and what is not known, in words for the user.

    Raises:
        ConfigError: a setting that cannot be read, or that this kind does not take.
    """
    settings = dict(found.settings)
    # What decides numbers and stands in no file of that kind.
    wanted = {"exported": tuple(_FIELDS), "monai-bundle": ("activation",)}.get(found.kind, ())
    for key in [key for key in _FIELDS if key in parts]:
        text = parts.pop(key)
        if key not in wanted or settings.get(_FIELDS[key], text) != text:
            raise ConfigError(
                f"{key}={text} is not for this teacher of kind {found.kind}: its own files say it.",
                where=where,
                fix="Leave it out.",
            )
        settings[_FIELDS[key]] = _setting(key, text, where)
    lacking = [key for key in wanted if _FIELDS[key] not in settings]
    if ask is not None:
        for key in lacking:
            settings[_FIELDS[key]] = _ask_setting(key, ask, where)
        return settings, []
    if not lacking:
        return settings, []
    examples = "; ".join(f"{key}: {_EXAMPLES[key]}" for key in lacking)
    flag = ",".join(f"{key}={_EXAMPLES[key].split(',')[0].split(' ')[0]}" for key in lacking)
    return settings, [
        f"{where}: its files do not say {', '.join(lacking)} ({examples}). Add to the flag, as it "
        f"was trained, for example {flag}."
    ]


def _ask_setting(key: str, ask: Ask, where: str) -> Any:
    hint = ""
    while True:
        try:
            return _setting(key, ask(f"{hint}{where}: {key} ({_EXAMPLES[key]})").strip(), where)
        except ConfigError as error:
            hint = f"{error.what} "


def _setting(key: str, text: str, where: str) -> Any:
    if key == "activation" and text in ("softmax", "sigmoid"):
        return text
    if key == "orientation" and re.fullmatch("[LRAPSI]{3}", text):
        return text
    if key == "spacing" and (match := _SPACING.fullmatch(text)):
        return [float(number) for number in match.groups()]
    if key == "window" and (match := _WINDOW.fullmatch(text)):
        return {"kind": "window", "window_hu": [float(number) for number in match.groups()]}
    raise ConfigError(
        f"{key}={text} cannot be read.", where=where, fix=f"Write {key}: {_EXAMPLES[key]}."
    )
