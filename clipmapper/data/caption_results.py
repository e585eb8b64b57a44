"""Captions in the results format of COCO's evaluation server."""

import json
from collections.abc import Iterable
from pathlib import Path


def write_captions_file(path: Path, captions: Iterable[tuple[int | str, str]]) -> Path:
    """``[{"image_id": ..., "caption": ...}, ...]``, one for each image; returns the path."""
    path.write_text(json.dumps([{"image_id": image, "caption": caption} for image, caption in captions]))
    return path
