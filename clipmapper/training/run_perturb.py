"""The run behind ``scripts/perturb.py``: score explanation methods on a trained model."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

from hydra.utils import instantiate
from tqdm import tqdm

from clipmapper.config import PerturbConfig
from clipmapper.errors import UserError
from clipmapper.evaluation.perturbation import FRACTIONS
from clipmapper.evaluation.perturbation_scores import DIRECTIONS, MODALITIES
from clipmapper.models.build import load
from clipmapper.training.explained_samples import choose_samples
from clipmapper.training.explanation_report import explanation_report
from clipmapper.training.pictures import write_pictures
from clipmapper.training.run_explain import chosen_device
from clipmapper.training.run_folder import RESULTS, write_json
from clipmapper.training.tables import console, files_table, localisation_table, perturbation_table

_PICTURES = 8


def perturb_checkpoint(config: PerturbConfig) -> Path:
    """Explain questions of the checkpoint's own data, print the tables, write ``results.json`` and pictures.

    Finished chunks are kept in ``output/chunks``; with ``resume`` a run that was stopped takes them up again.
    """
    began = time.monotonic()
    model = load(config.checkpoint, chosen_device(config.device))
    if "data" not in model.description:
        raise UserError(f"checkpoint={config.checkpoint}: does not say which data it was trained on")
    data = instantiate(model.description["data"])
    samples = choose_samples(model, getattr(data, config.split), config.samples, config.seed)
    folder = Path(config.output)
    settings = asdict(config)
    digest = hashlib.sha256(Path(config.checkpoint).read_bytes()).hexdigest()
    depends = {k: v for k, v in settings.items() if k in ("methods", "samples", "split", "seed", "chunk")}
    total = len(samples) * len(config.methods) * len(MODALITIES) * len(DIRECTIONS) * len(FRACTIONS)
    chunks = folder / "chunks"
    if not config.resume and chunks.exists():
        for file in chunks.glob("chunk_*.npz"):
            file.unlink()
    with tqdm(total=total, desc="perturbation") as bar:
        report = explanation_report(
            model,
            samples,
            config.methods,
            chunk=config.chunk,
            batch_size=config.batch_size,
            seed=config.seed,
            folder=chunks,
            key=json.dumps({"checkpoint": digest, **depends}, sort_keys=True),
            progress=bar.update,
        )
        bar.update(total - bar.n)
    numbers = report.numbers(config.confidence, config.seed)
    pictures = write_pictures(
        report, folder / "pictures", count=min(_PICTURES, len(samples)), confidence=config.confidence
    )
    write_json(
        folder / RESULTS,
        {"settings": settings, "explanations": numbers, "seconds": round(time.monotonic() - began, 1)},
    )
    out = console()
    for score in ("accuracy", "probability"):
        out.print(perturbation_table(numbers, score))
    table = localisation_table(numbers)
    if table is not None:
        out.print(table)
    out.print(files_table({"results": folder / RESULTS, "pictures": pictures[0].parent}))
    return folder
