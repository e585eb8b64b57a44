"""Perturbation of a large set in chunks, so that an interrupted run goes on where it stopped."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clipmapper.errors import visible
from clipmapper.evaluation.perturbation_scores import PerturbationScores, write_arrays

_log = logging.getLogger(__name__)


def run_in_chunks(
    n_samples: int,
    chunk_size: int,
    compute: Callable[[range], PerturbationScores],
    *,
    folder: Path | None,
    key: str,
    progress: Callable[[int], None] | None = None,
) -> PerturbationScores:
    """Scores of samples 0 … n_samples − 1, `chunk_size` at a time; `compute` gets the positions of one chunk.

    With a `folder`, each finished chunk is kept as `chunk_00000.npz` and so on, together with `key`: a string
    that names everything the numbers depend on (checkpoint, data, methods, seed, fractions …). A later run
    takes a chunk with the same key and the same positions from its file; any other file is replaced, a
    damaged one with a warning in the log. `progress` is told the number of samples each chunk settled.
    """
    if n_samples < 1 or chunk_size < 1:
        raise ValueError(f"needs at least one sample and a chunk of at least one: {n_samples}, {chunk_size}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for index, start in enumerate(range(0, n_samples, chunk_size)):
        positions = range(start, min(start + chunk_size, n_samples))
        path = None if folder is None else folder / f"chunk_{index:05d}.npz"
        # The positions belong to the key: another chunk size cuts the same samples differently.
        chunk_key = f"{key} [{positions.start}:{positions.stop}]"
        scores = None if path is None else _load_chunk(path, chunk_key)
        if scores is None:
            scores = compute(positions)
            if path is not None:
                write_arrays(path, {**scores.to_arrays(), "key": np.array(chunk_key)})
        chunks.append(scores)
        if progress is not None:
            progress(len(positions))
    return PerturbationScores.concatenate(chunks)


def finished_chunks(folder: Path, key: str) -> int:
    """How many chunks, in ``folder`` and those in it, a run with this ``key`` need not compute again."""
    return sum(_key_of(path).startswith(f"{key} [") for path in folder.rglob("chunk_*.npz"))


def _key_of(path: Path) -> str:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return str(stored["key"])
    except Exception:  # as in _load_chunk
        return ""


def _load_chunk(path: Path, chunk_key: str) -> PerturbationScores | None:
    if not path.exists():
        return None
    try:
        # Opened here, because numpy leaves a damaged file open that it was given by name.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != chunk_key:
                return None
            return PerturbationScores.from_arrays(stored)
    # What numpy raises for an empty, a foreign, an incomplete and a cut file, and one with pickled objects.
    except Exception as error:
        _log.warning("%s is damaged and is computed again (%s)", path, visible(str(error)))
        return None
