"""How much of a batch fits in memory, and a learning rate, found by trying (Lightning's ``Tuner``)."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lightning
import torch
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset

from clipmapper.errors import UserError
from clipmapper.settings.schema import TrainConfig
from clipmapper.training.batches import StepBatches
from clipmapper.training.memory import out_of_memory, taken
from clipmapper.training.module import TaskModule
from clipmapper.training.processes import Share, this_share
from clipmapper.training.run_folder import FOUND, write_json
from clipmapper.training.shown import console
from clipmapper.training.task import TaskRun
from clipmapper.visual.layout import save_figure
from clipmapper.visual.learning_rate import plot_learning_rates

PICTURE = "learning_rate.png"
_STEPS = 3  # a size is tried for
_RATES = 100
_LOWEST, _HIGHEST = 1e-6, 1.0
_FIRST = 10  # rates whose losses say little: nothing is smoothed yet


def check_alone(config: TrainConfig) -> None:
    """Raise ``UserError`` where several processes are to search: each would find another answer."""
    for key in ("find_batch_size", "find_learning_rate"):
        if getattr(config.trainer, key) and this_share().of > 1:
            raise UserError(f"trainer.{key}: not by several processes; search in one, and give what it finds")


def found(config: TrainConfig, run: TaskRun, folder: Path, resumed: bool) -> TrainConfig:
    """The settings with what was searched for in its place; ``folder`` keeps it (``found.json``).

    The model, the random state and whatever else training begins with are as they were. A resumed run
    searches nothing: it goes on with what it had found. What is tried is the encoder as it will be trained,
    but for the rate: that is the mapper's and the head's, and the encoder rests.
    """
    trainer = config.trainer
    if not (trainer.find_batch_size or trainer.find_learning_rate):
        return config
    kept = folder / FOUND
    if resumed and kept.is_file():
        told = json.loads(kept.read_text())
    else:
        told = {}
        if trainer.find_batch_size:
            told["batch_size"] = _most_that_fits(config, run, folder)
        config = _with(config, told)
        if trainer.find_learning_rate:
            told["learning_rate"] = _learning_rate(config, run, folder)
        write_json(kept, told)
    again = " (found when the run began; resume=true searches nothing)" if resumed else ""
    for line in _lines(config, told):
        console().print(line + again)
    run.config = _with(config, told)
    return run.config


def _with(config: TrainConfig, told: dict) -> TrainConfig:
    if size := told.get("batch_size"):
        parts = _parts(config.training.batch_size, size)
        config = replace(config, trainer=replace(config.trainer, accumulate_grad_batches=parts))
    if rate := told.get("learning_rate"):
        config = replace(config, training=replace(config.training, learning_rate=rate))
    return config


def _lines(config: TrainConfig, told: dict) -> Iterator[str]:
    whole = config.training.batch_size
    if size := told.get("batch_size"):
        parts = _parts(whole, size)
        how = "are taken at once" if parts == 1 else f"are worked off in {parts} parts of {whole // parts}"
        yield f"trainer.find_batch_size: {size} samples fit in memory; the {whole} of a step {how}"
    if "learning_rate" in told:
        rate = told["learning_rate"]
        which = (
            f"none can be told from the loss; training.learning_rate={config.training.learning_rate:g} stays"
            if rate is None
            else f"{rate:.3g}"
        )
        yield f"trainer.find_learning_rate: {which}; see {PICTURE}"


def _parts(batch_size: int, fits: int) -> int:
    """In how many equal parts of at most ``fits`` a batch is worked off."""
    return next(n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n <= fits)


class _Parts(IterableDataset):
    """The parts that a step would be worked off in, were no more of them to fit than the module says."""

    def __init__(self, batch_at: Callable[[int, Share], dict], module: TaskModule, batch_size: int) -> None:
        self.batch_at, self.module, self.whole = batch_at, module, batch_size

    def __iter__(self) -> Iterator[dict]:
        size = self.module.batch_size
        if size < 1:
            raise UserError(_nothing_fits())
        for step in range(_STEPS + 1):  # one is fetched ahead
            yield self.batch_at(step, Share(0, _parts(self.whole, size)))


class _Loaded(lightning.LightningDataModule):
    """Where Lightning's search for a size wants its batches from."""

    def __init__(self, loader: DataLoader) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> DataLoader:
        return self.loader

    def val_dataloader(self) -> list[DataLoader]:
        return []


def _nothing_fits() -> str:
    return f"trainer.find_batch_size: not even one sample fits in memory{taken()}"


def _most_that_fits(config: TrainConfig, run: TaskRun, folder: Path) -> int:
    whole = config.training.batch_size
    with _as_it_was(run) as module:
        module.batch_size = 1
        trials = math.ceil(math.log2(whole)) + 1
        tried = _Loaded(DataLoader(_Parts(run.batch_at, module, whole), batch_size=None))
        tuner = Tuner(_trainer(config, folder, 1))
        try:
            size = tuner.scale_batch_size(
                module, datamodule=tried, init_val=1, max_trials=trials, steps_per_trial=_STEPS
            )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise UserError(_nothing_fits()) from error
    return min(size, whole)


def _learning_rate(config: TrainConfig, run: TaskRun, folder: Path) -> float | None:
    with _as_it_was(run) as module:
        module.frozen_steps = _RATES
        parts = config.trainer.accumulate_grad_batches
        batches = StepBatches(run.batch_at, 0, _RATES + 1, accumulated=parts, terms=module.terms)
        tuner = Tuner(_trainer(config, folder, parts))
        search = tuner.lr_find(
            module,
            datamodule=_Loaded(DataLoader(batches, batch_size=None)),
            min_lr=_LOWEST,
            max_lr=_HIGHEST,
            num_training=_RATES,
            update_attr=False,
        )
    rates, losses = search.results["lr"], search.results["loss"]
    count = min(len(rates), len(losses))
    rate = steepest(rates[:count], losses[:count])
    save_figure(plot_learning_rates(rates[:count], losses[:count], rate), folder / PICTURE)
    return rate


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the loss falls fastest while the rate rises by a factor; None where it never falls.

    (Lightning's own suggestion divides by the difference of rates, which is smallest for the smallest.)
    """
    value = torch.tensor(losses, dtype=torch.float64)[_FIRST:-1]
    place = torch.tensor(rates, dtype=torch.float64).log()[_FIRST:-1]
    if len(value) < 2 or not bool(value.isfinite().all()):
        return None
    slope = torch.gradient(value, spacing=(place,))[0]
    lowest = int(slope.argmin())
    return float(place[lowest].exp()) if slope[lowest] < 0 else None


def _trainer(config: TrainConfig, folder: Path, parts: int) -> lightning.Trainer:
    settings = config.trainer
    return lightning.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=settings.precision,
        gradient_clip_val=settings.gradient_clip_val,
        accumulate_grad_batches=parts,
        max_steps=_RATES,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )


@contextmanager
def _as_it_was(run: TaskRun) -> Iterator[TaskModule]:
    """A module to try things with, whose model is afterwards what it was: weights, modes, gradients, device;
    and so is the random state."""
    model = run.model
    device, state = model.device, {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = {part: part.training for part in model.modules()}
    with isolate_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about a module that is not validated here
        try:
            yield run.module()
        finally:
            model.to(device)
            model.load_state_dict(state)
            model.zero_grad(set_to_none=True)
            model.encoder.resting = False
            for part, training in modes.items():
                part.training = training
