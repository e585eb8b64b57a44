"""Closed lists of what a file may say: keys, types and ranges, checked before anything is made of it.

A rule is a function of (value, where) that raises ``ValueError`` with one line where the value is not what it
may be. ``where`` names the value: ``encoder.config.text_cfg.layers``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import get_type_hints

from clipmapper.settings.keys import Section

Rule = Callable[[object, str], None]
_SHOWN = 60  # characters of a value that a message quotes


def whole(least: int, most: int) -> Rule:
    """A whole number; true and false are none."""

    def check(value: object, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{where}: {shown(value)} is not a whole number from {least} to {most}")

    return check


def number(least: int | float, most: int | float) -> Rule:
    def check(value: object, where: str) -> None:
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"{where}: {shown(value)} is not a number from {least:g} to {most:g}")

    return check


def one_of(*choices: str | bool | None) -> Rule:
    def check(value: object, where: str) -> None:
        if not any(value is choice or (type(value) is str and value == choice) for choice in choices):
            raise ValueError(f"{where}: {shown(value)} is not one of {', '.join(map(str, choices))}")

    return check


flag = one_of(True, False)


def text(most: int) -> Rule:
    """A text of at most so many characters."""

    def check(value: object, where: str) -> None:
        if type(value) is not str or len(value) > most:
            raise ValueError(f"{where}: {shown(value)} is not a text of at most {most} characters")

    return check


def absent_or(rule: Rule) -> Rule:
    """None, or what the rule allows."""

    def check(value: object, where: str) -> None:
        if value is not None:
            rule(value, where)

    return check


def list_of(rule: Rule, least: int = 0, most: int = 10_000_000) -> Rule:
    def check(value: object, where: str) -> None:
        if type(value) not in (list, tuple) or not least <= len(value) <= most:
            raise ValueError(f"{where}: {shown(value)} is not a list of {least} to {most} entries")
        for place, entry in enumerate(value):
            rule(entry, f"{where}[{place}]")

    return check


def either(first: Rule, second: Rule) -> Rule:
    """Make a rule that is the second one for lists and the first one for anything else."""

    def check(value: object, where: str) -> None:
        (second if isinstance(value, list | tuple) else first)(value, where)

    return check


def section(needed: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None) -> Rule:
    """Keys with their rules; a key that is not listed is refused."""
    known = {**(optional or {}), **needed}

    def check(value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: {shown(value)} is not a section of settings")
        for key in value:
            if key not in known:
                raise ValueError(f"{where}: {shown(key)} is not one of the keys that a file may have here")
        for key in needed:
            if key not in value:
                raise ValueError(f"{where}: has no {key}")
        for key, entry in value.items():
            known[key](entry, f"{where}.{key}")

    return check


def section_of_numbers(schema: type[Section], leaving: Sequence[str] = ()) -> Rule:
    """The whole numbers of a section of the settings, within the limits that the schema gives them."""
    hints = get_type_hints(schema)
    chosen = [one for one in fields(schema) if one.name not in leaving]
    wrong = [one.name for one in chosen if hints[one.name] is not int or not _limits(one)]
    if wrong:
        raise TypeError(f"{schema.__name__}: {wrong[0]} is no whole number with a least and a most")
    return section({one.name: whole(*_limits(one)) for one in chosen})


def shown(value: object) -> str:
    """A value as a message quotes it: short, whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…")
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, int):  # str() refuses numbers of thousands of digits
        return str(value) if value.bit_length() < 64 else "a number of very many digits"
    return f"a {type(value).__name__}"


def _limits(declared: Field) -> tuple[int, int] | None:
    found = tuple(declared.metadata.get(key, MISSING) for key in ("minimum", "maximum"))
    return None if MISSING in found else found
