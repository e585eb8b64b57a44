"""Where the files that come with the program lie: ``conf/`` and ``checkpoints/``."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_root() -> Path:
    """The folder that holds ``conf/`` and ``checkpoints/``: the repository, or the installed wheel's copy."""
    inside_wheel = _PACKAGE / "_shipped"
    return inside_wheel if inside_wheel.is_dir() else _PACKAGE.parent


def shipped_path(path: str | Path) -> Path:
    """``path`` as given when it exists from here; otherwise, if it is relative, as shipped."""
    given = Path(path).expanduser()
    if given.exists() or given.is_absolute():
        return given
    shipped = shipped_root() / given
    return shipped if shipped.exists() else given
