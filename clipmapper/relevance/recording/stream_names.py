"""Names of a model's streams, and the grid of its image patches."""

import functools
import re
from collections.abc import Iterable
from contextlib import ExitStack

from torch import Tensor, nn

from clipmapper.relevance.recording.capture import Watched

_WORDS = (("image", r"vision|visual|image|vit|dino"), ("text", r"text|language|gpt|bert|llama"))

# Towers of transformers, recorded alone. (Speech2Text is none.)
_TOWERS = (
    ("image", r"Vision(Model|Transformer|Tower)"),
    ("text", r"(?<!2)Text(Model|Transformer)"),
)


def stream_name(watched: Watched, root: nn.Module) -> str:
    """image, text, encoder, decoder ...: of the family's line, or from the names on the module's path."""
    path = watched.name.split(",")[0]
    for part, name in watched.kind.streams.items():
        if part in path:
            return name
    named = _by_path(path)
    if named is not None:
        return named
    kinds = [type(root).__name__]
    for end in range(1, len(path.split("."))):
        kinds.append(type(root.get_submodule(".".join(path.split(".")[:end]))).__name__)
    for kind in reversed(kinds):
        for name, words in _TOWERS:
            if re.search(words, kind):
                return name
    for name in ("decoder", "encoder"):
        if name in path:
            return name
    # A text transformer unpacked into CLIP itself, or one tower recorded alone.
    for kind in reversed(kinds):
        for name, words in (*_WORDS, ("text", r"CLIP|CoCa")):
            if re.search(words, kind, re.IGNORECASE if words != r"CLIP|CoCa" else 0):
                return name
    return "tokens"


@functools.cache
def _by_path(path: str) -> str | None:
    for name, words in _WORDS:
        if re.search(words, path, re.IGNORECASE):
            return name
    return None


def grids_seen(stack: ExitStack, modules: Iterable[nn.Module]) -> list[tuple[int, int]]:
    """Holds, after a forward, (rows, columns) of what each patch embedding gave, until ``stack`` is left.

    Images need not have the size that the model was made for (position embeddings can be interpolated).
    """
    seen: list[tuple[int, int]] = []

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append((output.shape[-2], output.shape[-1]))

    for module in modules:
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size != (1, 1):
            stack.callback(module.register_forward_hook(note).remove)
    return seen


def patch_grid(root: nn.Module, modules: Iterable[nn.Module]) -> tuple[int, int] | None:
    """(rows, columns) of the image patches of the size that the model was made for, where it says so."""
    for module in modules:
        size = vars(module).get("grid_size")
        if isinstance(size, tuple | list) and len(size) == 2:
            return int(size[0]), int(size[1])
    config = getattr(root, "config", None)
    config = getattr(config, "vision_config", config)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is None or patch is None:
        return None
    rows, columns = ((n, n) if isinstance(n, int) else tuple(n) for n in (image, patch))
    return rows[0] // columns[0], rows[1] // columns[1]
