"""Sections of settings, and what can be said of a single setting."""

from collections.abc import Iterator, Sequence
from dataclasses import Field, field
from typing import Any, Optional

from omegaconf import MISSING

SEED_LIMIT = 2**32 - 1  # numpy's legacy generator, which Lightning seeds as well, takes no more


def explanation_methods() -> Sequence[str]:
    """The names of the explanation methods, looked up when one is to be checked: they import torch."""
    from clipmapper.relevance import METHODS

    return tuple(METHODS)


def setting(**limits: Any) -> Any:
    """A field whose value comes from YAML or the command line.

    ``limits``: ``minimum``, ``maximum`` (allowed themselves), ``above``, ``below`` (not allowed themselves);
    ``choices`` of a string or of a list's entries, or a function that gives them. Choices are strings rather than an ``Enum`` because they
    end up in JSON, in W&B and in checkpoints that are loaded without unpickling classes. ``text``:
    free text (:func:`is_text`) though the type does not say so.
    """
    return field(default=MISSING, metadata=limits)


class Section:
    """A group of settings."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """(setting, what is wrong with it), for rules that one setting's limits cannot say."""
        yield from ()


def list_problems(key: str, values: list[str]) -> Iterator[tuple[str, str]]:
    """Problems of a list that is empty or has something twice."""
    if not values:
        yield key, "is an empty list"
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        yield key, f"{twice[0]!r} is listed twice"


def is_text(declared: Field, hint: Any) -> bool:
    """Whether a setting is free text: a string that is none of some choices. It is not empty, and taken from
    the command line as it is, without Hydra's grammar (commas, brackets, ``=``)."""
    if declared.metadata.get("text"):
        return True
    return hint in (str, str | None, Optional[str]) and not declared.metadata.get("choices")
