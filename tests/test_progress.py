"""How far long work is, where there is no terminal: a line a minute."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from clipmapper.host import progress
from clipmapper.host.progress import ProgressLines, counted
from clipmapper.training import trainer as of_runs
from clipmapper.training.batches import Labelled, SplitBatches
from clipmapper.training.launching import less_noise
from clipmapper.training.processes import Share, batch_count, batches_of


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        return (self.weight * batch).sum()

    def validation_step(self, batch, index, dataloader_idx=0):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Rows(SplitBatches):
    """A split of ten samples."""

    records = range(10)
    labelled_at_most = 2

    def labelled_batch(self, rows):
        return torch.ones(len(rows))


@pytest.fixture
def fitted():
    def fit(bar) -> None:
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=3, val_check_interval=3, check_val_every_n_epoch=None,
            num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_model_summary=False,
            callbacks=[bar],
        )  # fmt: skip
        validation = [DataLoader(Labelled(Rows()), batch_size=None) for _ in range(2)]
        with less_noise():
            trainer.fit(Model(), DataLoader(torch.ones(5, 1)), validation)

    return fit


def test_a_run_in_a_log_tells_its_steps_and_the_batches_of_validation(fitted, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    bar = of_runs.steps_progress(1)  # pytest is no terminal
    assert isinstance(bar, of_runs.StepsLines)
    fitted(bar)
    said = [line.split(" (")[0] for line in capsys.readouterr().out.splitlines() if " of " in line]
    assert said == [f"training steps: {n} of 3" for n in (1, 2, 3)] + [
        f"validation after step 3, batches: {n} of 10" for n in range(1, 11)
    ]


def test_the_bar_of_a_validation_has_a_total(fitted, monkeypatch):
    totals = []

    class Bar(of_runs.StepsBar):
        def on_validation_batch_end(self, *args) -> None:
            totals.append(self.total_val_batches_current_dataloader)
            super().on_validation_batch_end(*args)

    fitted(Bar())
    assert totals == [5] * 10


@pytest.mark.parametrize("share", [Share(0, 1), Share(1, 3)])
def test_as_many_batches_as_are_told(share):
    for count in (3, 7, 64, 65):
        assert batch_count(count, 4, share) == len(list(batches_of(count, 4, share)))


def test_a_rate_without_what_was_there_already(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines = ProgressLines("steps", 1000, done=400)
    now[0] = 60.0
    lines.to(460)
    assert capsys.readouterr().out == "steps: 460 of 1,000 (46 %), 1.00 a second, about 9.0 min left\n"
    assert ProgressLines("rows", None).line(1.0) == "rows: 0 (0.00 a second)"
    assert list(counted(range(200), "rows")) == list(range(200))
