"""Names of classes, which the ``datasets`` library stores as numbers, from its description of the columns."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Naming = Callable[[Any], Any]


def naming(feature: object) -> Naming | None:
    """Return a function that turns a value of this feature (as ``Features.to_dict`` writes it) into one with
    names; None where it has no classes. A number without a name (−1: the label is unknown) becomes None."""
    if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        return (lambda value: _name(names, value)) if isinstance(names, list) else None
    if isinstance(feature, Sequence) and not isinstance(feature, str):
        return _each(naming(feature[0])) if len(feature) == 1 else None
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") in ("Sequence", "List", "LargeList") and "feature" in feature:
        return _each(naming(feature["feature"]))
    inner = {name: found for name, of in feature.items() if (found := naming(of)) is not None}
    return (lambda value: _fields(inner, value)) if inner else None


def namings(features: object) -> dict[str, Naming]:
    """Return the :func:`naming` of each column that has classes."""
    if not isinstance(features, Mapping):
        return {}
    return {name: found for name, of in features.items() if (found := naming(of)) is not None}


def named(row: Mapping, by: Mapping[str, Naming]) -> dict:
    """A row with names for numbers."""
    return {name: by[name](value) if name in by else value for name, value in row.items()}


def features_in_parquet(metadata: Mapping[bytes, bytes] | None) -> object:
    """Return the features that ``datasets`` has written into a Parquet file's schema; None if it has not."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return None


def _name(names: list, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(names[value]) if 0 <= value < len(names) else None
    return value


def _each(of: Naming | None) -> Naming | None:
    if of is None:
        return None

    def each(value: Any) -> Any:
        if isinstance(value, Mapping):  # a list of objects, which `datasets` gives as an object of lists
            parted = {k: [of({k: one}) for one in v] if isinstance(v, list) else v for k, v in value.items()}
            return {k: [one[k] for one in v] if isinstance(v, list) else v for k, v in parted.items()}
        return [of(one) for one in value] if isinstance(value, list | tuple) else value

    return each


def _fields(inner: Mapping[str, Naming], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_fields(inner, one) for one in value]
    return named(value, inner) if isinstance(value, Mapping) else value
