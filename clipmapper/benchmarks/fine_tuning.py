"""How ways to fine-tune compare on a data set: a training run and a test of each, at several sizes of it.

The table of docs/fine_tuning.md is made by it.
"""

import json
import os
import random
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryFile

from rich.table import Table
from tqdm import tqdm

from clipmapper.benchmarks.timing import earlier_rows, write_results
from clipmapper.commands.explain import chosen_device
from clipmapper.commands.mistakes import seed, some_path, whole
from clipmapper.data.text_files import parsed_json, text_lines
from clipmapper.errors import UserError
from clipmapper.host.machine import machine
from clipmapper.host.outputs import write_whole
from clipmapper.training.shown import console

STARTS = {"init": ("init=scenes-vqa",), "scratch": ("init=null",)}
ENCODERS = {
    "all": ("encoder.frozen=false",),
    "LoRA": ("encoder.frozen=false", "encoder.lora_rank=8"),
    "frozen": ("encoder.frozen=true", "training.layer_decay=1", "training.token_cache=true"),
}
AUGMENTATIONS = {
    "crop": ("data.augment=crop",),
    "none": ("data.augment=none",),
}
# Rows of other settings are not set side by side.
_MUST_AGREE = {"settings": ("data", "test", "steps", "validation", "held_back")}
_FEW = 1000  # questions
_VALIDATIONS = 4  # in a run; the best one is tested
_KEY = ("questions", "start", "encoder", "augmentation", "seed")


def fine_tuning_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=some_path, required=True, help="a manifest (.jsonl) to train on")
    parser.add_argument("--test", type=some_path, required=True, help="one whose split is test")
    parser.add_argument(
        "--questions", type=whole(0), nargs="+", default=[600, 5000, 0], help="to train on; 0: all"
    )
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=[*STARTS])
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=[*ENCODERS])
    parser.add_argument("--augmentations", nargs="+", choices=AUGMENTATIONS, default=[*AUGMENTATIONS])
    parser.add_argument("--steps", type=whole(), default=600)
    parser.add_argument("--held-back", type=whole(), default=400, help="images that are only validated on")
    parser.add_argument("--validation", type=whole(), default=1500, help="questions about them")
    parser.add_argument("--jobs", type=whole(), default=1, help="runs at a time, which share the cores")
    parser.add_argument("--resume", action="store_true", help="keep what the file has of an earlier run")


def fine_tuning(options: Namespace) -> dict:
    """Test accuracy of a model fine-tuned in several ways, with several amounts of data and seeds.

    Every run is ``clipmapper train experiment=fine_tune`` with other settings, and is tested with its best
    validation's weights. Raises ``UserError`` for manifests that are none, and where a run fails.
    """
    options.data, options.test = str(options.data.absolute()), str(options.test.absolute())
    output = Path(options.output)
    results = {"machine": machine(chosen_device("cpu")), "settings": vars(options), "rows": []}
    if options.resume:
        results["rows"] = earlier_rows(output / f"{options.name}.json", results, _MUST_AGREE)
    cells = [
        dict(zip(_KEY, cell, strict=True))
        for cell in product(
            options.questions, options.starts, options.encoders, options.augmentations, options.seeds
        )
    ]
    cells.sort(key=lambda cell: options.seeds.index(cell["seed"]))  # a whole table of the first seed first
    known = [{key: row.get(key) for key in _KEY} for row in results["rows"]]
    data = {
        count: _part(Path(options.data), count, options, output / f"{options.name}_data")
        for count in dict.fromkeys(options.questions)
    }
    left = [cell for cell in cells if cell not in known]
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(left), desc="fine_tuning") as bar:
        for row in pool.map(lambda cell: _measured(cell, data[cell["questions"]], options), left):
            results["rows"].append(row)
            write_results(options.name, results, output)
            bar.update()
    return results


def _part(manifest: Path, count: int, options: Namespace, folder: Path) -> Path:
    """A manifest with ``count`` questions of some images; those for validation are the same at every size."""
    rows: dict[str, list[dict]] = {}
    for line in text_lines(manifest, "--data"):
        if line.strip():
            try:
                row = parsed_json(line)
                image = os.path.join(manifest.parent, row["image"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(f"--data {manifest}: not a manifest in lines of JSON") from error
            rows.setdefault(image, []).append({**row, "image": image})
    images = sorted(rows)
    random.Random(0).shuffle(images)
    held_back, others = images[: options.held_back], images[options.held_back :]
    if not others:
        raise UserError(f"--held-back {options.held_back}: --data has {len(images)} images in all")
    validation = [row for image in held_back for row in rows[image]]
    random.Random(1).shuffle(validation)
    training = [row for image in others for row in rows[image]][: count or None]
    lines = [{**row, "split": "train"} for row in training]
    lines += [{**row, "split": "validation"} for row in validation[: options.validation]]
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in lines)
    return write_whole(folder / f"{count or 'all'}.jsonl", text)


def settings_of(cell: Mapping, data: Path, steps: int) -> list[str]:
    """What is given to ``clipmapper train`` for a cell of the table."""
    return [
        "experiment=fine_tune",
        f"data.path={data}",
        f"seed={cell['seed']}",
        f"training.max_steps={steps}",
        *STARTS[cell["start"]],
        *ENCODERS[cell["encoder"]],
        *AUGMENTATIONS[cell["augmentation"]],
        "training.balance=answers" if 0 < cell["questions"] <= _FEW else "training.questions_per_image=4",
    ]


def _measured(cell: Mapping, data: Path, options: Namespace) -> dict:
    """Train, test, and take what the two result files say."""
    folder = Path(options.output, f"{options.name}_runs", "_".join(str(cell[key]) for key in _KEY))
    settings = settings_of(cell, data, options.steps)
    # Neither explanations nor the question-only baseline are of the time that is compared.
    quick = ["callbacks=none", "training.blind_steps=0", "logger=csv", "data.workers=0"]
    quick.append(f"trainer.val_check_interval={max(1, options.steps // _VALIDATIONS)}")
    seconds = _run("train", [*settings, *quick, f"output={folder}", "name=train"], options.jobs)
    run = max(folder.glob("train/*/results.json"))
    checkpoint = run.parent / "checkpoints" / "best.ckpt"
    tested = [f"checkpoint={checkpoint}", "data=manifest", f"data.path={options.test}", "split=test"]
    _run("evaluate", [*tested, f"output={folder / 'test'}", "data.check=none"], options.jobs)
    trained = json.loads(run.read_text())
    scores = json.loads((folder / "test" / "results.json").read_text())["models"]["best"]["scores"]
    return {
        **cell,
        "settings": settings,
        "accuracy": {family: score["accuracy"]["mean"] for family, score in scores.items()},
        "validation": trained["best"]["value"],
        "best_step": trained["best"]["step"],
        "minutes": seconds / 60,
    }


def _run(command: str, settings: Sequence[str], jobs: int) -> float:
    """Seconds of processor time, which other runs beside this one take little part in."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    program = "from clipmapper.cli import main; main()"
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", program, command, *settings],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            last = next((line for line in reversed(errors.readlines()) if line.strip()), "").strip()
            raise UserError(f"clipmapper {command} {' '.join(settings)}: {last}")
    return used.ru_utime + used.ru_stime


def _grouped(rows: Sequence[Mapping]) -> Iterator[tuple[tuple, list[Mapping]]]:
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _KEY[:-1]), []).append(row)
    yield from groups.items()


def show(results: dict) -> None:
    table = Table(title="Accuracy on the test split, %", title_justify="left")
    for column in (*_KEY[:-1], "of each seed", "mean", "core minutes"):
        table.add_column(column.replace("_", " "))
    for (questions, *cell), rows in _grouped(results["rows"]):
        accuracies = [100 * row["accuracy"]["overall"] for row in rows]
        each = " ".join(f"{value:.1f}" for value in accuracies)
        minutes = f"{mean(row['minutes'] for row in rows):.1f}"
        table.add_row(str(questions or "all"), *cell, each, f"{mean(accuracies):.1f}", minutes)
    console().print(table)
