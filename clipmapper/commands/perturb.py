"""The run behind ``scripts/perturb.py``: score explanation methods on a trained model."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

from clipmapper.commands.explain import chosen_device
from clipmapper.errors import UserError
from clipmapper.evaluation.captions.scores import check_scores
from clipmapper.evaluation.perturbation_run import finished_chunks
from clipmapper.host.outputs import NO_ROOM, check_folder
from clipmapper.host.progress import progress
from clipmapper.models.build import load
from clipmapper.models.tokens import cut_texts_said_once
from clipmapper.settings.schema import PerturbConfig
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.perturbation import LOG_PROBABILITY
from clipmapper.training.checkpoint_data import data_for
from clipmapper.training.explained_records import samples_of, unanswerable
from clipmapper.training.explanation_kinds import explanation_kind
from clipmapper.training.interruption import RunInterrupted
from clipmapper.training.run_folder import RESULTS, write_json
from clipmapper.training.tables import console, files_table

_PICTURES = 8


@cut_texts_said_once()
def perturb_checkpoint(config: PerturbConfig) -> Path:
    """Explain questions (captions) of the settings' data or of the checkpoint's own world, print the tables,
    write ``results.json`` and pictures.

    Finished chunks are kept in ``output/chunks``; with ``resume`` a run that was stopped takes them up again.
    """
    began = time.monotonic()
    check_folder(Path(config.output), f"output={config.output}")
    model = load(config.checkpoint, chosen_device(config.device), config.architecture)
    data = data_for(model, config.data, config.checkpoint)
    captioner = isinstance(model, Captioner)
    options = {k: getattr(config, k) for k in ("word_weights", "caption_scores")}
    options = {k: value for k, value in options.items() if value is not None}
    if options and not captioner:
        raise UserError(f"{next(iter(options))}: this checkpoint answers questions, it writes no captions")
    if "caption_scores" in options:
        options["scores"] = options.pop("caption_scores")
        check_scores([score for score in options["scores"] if score != LOG_PROBABILITY])
    samples = samples_of(model, data, config.split, config.samples, config.seed)
    out = console()
    if line := unanswerable(samples):
        out.print(line)
    kind = explanation_kind(samples)
    folder = Path(config.output)
    settings = asdict(config)
    digest = hashlib.sha256(Path(config.checkpoint).read_bytes()).hexdigest()
    depends = {k: v for k, v in settings.items() if k in ("methods", "samples", "split", "seed", "chunk")}
    depends |= options | {"data": settings["data"], "explained": samples.digest()}
    total = kind.points(len(samples), len(config.methods))
    chunks = folder / "chunks"
    if not config.resume and chunks.exists():
        for file in chunks.rglob("chunk_*.npz"):
            file.unlink()
    key = json.dumps({"checkpoint": digest, **depends}, sort_keys=True)
    try:
        with progress("perturbation, points of curves", total) as advance:
            report = kind.report(
                model,
                samples,
                config.methods,
                chunk=config.chunk,
                batch_size=config.batch_size,
                seed=config.seed,
                folder=chunks,
                key=key,
                progress=advance,
                **options,
            )
    except KeyboardInterrupt as stop:
        raise RunInterrupted(_kept(chunks, key)) from stop
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"no room to write ({error.strerror}) in {folder}; {_kept(chunks, key)}") from error
    numbers = report.numbers(config.confidence, config.seed)
    pictures = kind.write(
        report, folder / "pictures", count=min(_PICTURES, len(samples)), confidence=config.confidence
    )
    write_json(
        folder / RESULTS,
        {"settings": settings, "explanations": numbers, "seconds": round(time.monotonic() - began, 1)},
    )
    for table in kind.tables(numbers):
        out.print(table)
    out.print(files_table({"results": folder / RESULTS, "pictures": pictures[0].parent}))
    return folder


def _kept(chunks: Path, key: str) -> str:
    """What the next call need not compute again, as the disk has it."""
    done = finished_chunks(chunks, key)
    if not done:
        return "nothing was saved: no chunk was finished"
    return (
        f"{done} chunk{'s' if done > 1 else ''} saved in {chunks}: the same command with resume=true goes on"
    )
