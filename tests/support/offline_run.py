"""Reads the file that an offline run of W&B leaves."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7  # bytes
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a ``.wandb`` file: LevelDB's log format behind a header of seven bytes.

    Blocks of 32 KiB hold pieces of records, each with checksum, length and whether more pieces follow. wandb
    itself has no reader in Python since it writes these files in Go.
    """
    raw = path.read_bytes()
    assert raw[:4] == b":W&B"
    at, parts = _HEADER, []
    while at < len(raw):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # too little for a piece: filled up
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + _HEADER])
        parts.append(raw[at + _HEADER : at + _HEADER + length])
        at += _HEADER + length
        assert (kind in (_FULL, _FIRST)) == (len(parts) == 1) and kind in (_FULL, _FIRST, _MIDDLE, _LAST)
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []
    assert not parts


class OfflineRun:
    """History (one dictionary a step, keys joined by "."), artifacts and files of an offline run."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("run-*.wandb")
        self.folder, self.history, self.artifacts, self.files = folder, [], [], []
        self.status: int | None = None  # of a run that has not ended
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                self.history.append(row)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "files":
                self.files += [file.path for file in record.files.files]
            elif kind == "run":
                self.run = record.run
            elif kind == "exit":  # the last, or, on a busy machine, followed by what the service still had
                self.status = record.exit.exit_code

    def logged(self, key: str) -> list:
        return [row[key] for row in self.history if key in row]
