"""Free text on the command line (questions, captions, paths), taken as it is."""

import re
from collections.abc import Sequence

from clipmapper.config import Section
from clipmapper.config_keys import setting_named


def quoted(arguments: Sequence[str], schema: type[Section], sweep: bool = False) -> list[str]:
    """Overrides whose free text neither Hydra's grammar nor OmegaConf's takes apart.

    Commas, brackets and quotes stay what they are, and so does ``${…}``: a question that holds
    ``${oc.env:HOME}`` is no request for it. With ``sweep`` a comma separates values, so that only the latter
    is kept.
    """
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        setting = setting_named(key.lstrip("+"), schema) if equals else None
        if setting and setting[0].metadata.get("text") and value != "null":
            argument = f"{key}={_literal(value) if sweep else _in_quotes(value)}"
        found.append(argument)
    return found


def _in_quotes(value: str) -> str:
    if re.fullmatch(r"'.*'|\".*\"", value, re.DOTALL):  # in quotes already
        return _literal(value)
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (match[2] and r"\'"), _literal(value))
    return f"'{escaped}'"


def _literal(value: str) -> str:
    """Without interpolations: a backslash before ``${``, and those that stand there doubled."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
