"""Captions in the results format of COCO's evaluation server."""

import json
from collections.abc import Iterable
from pathlib import Path

from clipmapper.outputs import write_whole


def write_captions_file(path: Path, captions: Iterable[tuple[int | str, str]]) -> Path:
    """``[{"image_id": ..., "caption": ...}, ...]``, one for each image; returns the path."""
    entries = [{"image_id": image, "caption": caption} for image, caption in captions]
    return write_whole(path, json.dumps(entries))
