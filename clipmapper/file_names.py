"""Names that become names of files and folders."""

from clipmapper.visible_text import visible

_LONGEST = 200  # bytes: file systems take 255, and something is put behind it
# What Windows takes for a device, whatever follows the dot.
_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{device}{number}" for device in ("com", "lpt") for number in range(10)),
}


def file_name_problem(name: str) -> str | None:
    """Why a name can be no file or folder inside another one; None if it can.

    It is to stay in its folder (no separators, no ``..``) and to be a name on every common system.
    """
    if not name.strip():
        return "is empty"
    quoted = repr(name if len(name) <= 60 else f"{name[:60]}…")
    if visible(name) != name or "\t" in name or "\n" in name:
        return f"{quoted} has control characters"
    if found := [character for character in name if character in '/\\:*?"<>|']:
        return f"{quoted} is to be the name of a folder, which can't have {found[0]}"
    if name.strip() != name or name.endswith(".") or name.startswith("."):
        return f"{quoted} is to be the name of a folder, which can't begin or end with a dot or a space"
    if name.split(".")[0].lower() in _DEVICES:
        return f"{quoted} is a device on Windows"
    if len(name.encode("utf-8", "surrogatepass")) > _LONGEST:
        return f"{quoted} is longer than {_LONGEST} bytes"
    return None
