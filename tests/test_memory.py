"""A device without memory is one line; a batch's parts and a learning rate are found by trying."""

import json

import pytest
import torch
from PIL import Image
from support import training_models
from support.training_models import same_bits

from clipmapper.commands import train as run
from clipmapper.commands.train import train
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.tasks.vqa.task import VQARun
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training import memory, tuning
from clipmapper.training.interruption import GracefulInterrupt
from clipmapper.training.processes import Share
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

TINY_RUN = (
    *training_models.SMALL_RUN,
    "data.train_scenes=16",
    "data.simple_scenes=8",
    "data.validation_scenes=8",
    "data.held_out_scenes=4",
    "training.max_steps=2",
    "training.warmup_steps=1",
    "training.blind_steps=0",
    "training.batch_size=12",
    "callbacks=none",
    "logger=csv",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
)
LINES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    return training_models.tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def settings(architecture, tmp_path):
    return training_models.settings_of_run(TINY_RUN, architecture, tmp_path)


def fits(monkeypatch, most: int) -> list[int]:
    """Let no more samples than these fit in a training step; the sizes that were tried."""
    tried = []
    step = VQAModule.training_step

    def training_step(self, batch, index):
        size = len(batch["targets"])
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return step(self, batch, index)

    monkeypatch.setattr(VQAModule, "training_step", training_step)
    return tried


@pytest.mark.parametrize("error", LINES, ids=["class", "text", "error", "mps"])
def test_all_ways_to_say_it(error):
    assert memory.out_of_memory(error)
    assert not memory.out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not memory.out_of_memory(ValueError("CUDA out of memory"))


def test_no_memory_is_one_line_with_what_helps(settings, monkeypatch):
    fits(monkeypatch, 4)
    monkeypatch.setattr(memory, "taken", lambda: " (at most 78.5 of 79.2 GiB were taken)")
    with pytest.raises(UserError) as caught:
        train(settings("trainer.accumulate_grad_batches=2"))
    line = str(caught.value)
    assert line == (
        "out of memory with training.batch_size=12, 6 at a time (at most 78.5 of 79.2 GiB were taken); "
        "trainer.accumulate_grad_batches=4 trains the same in smaller parts; training.batch_size=6 takes "
        "less. nothing was saved: there is nothing to resume"
    )


def test_what_was_taken_is_asked_of_the_device(monkeypatch):
    class Device:
        total_memory = 80 * 2**30

    assert memory.taken() == "" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 79 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Device)
    assert memory.taken() == " (at most 79.0 of 80.0 GiB were taken)"


def test_no_memory_to_explain_names_its_own_setting(settings, monkeypatch):
    def explain(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    explained = (
        "callbacks=relevance",
        "callbacks.samples=2",
        "callbacks.pictures=0",
        "callbacks.batch_size=8",
    )
    config = settings(*explained, "callbacks.methods=[weighted]")
    monkeypatch.setattr("clipmapper.tasks.vqa.task.VQA.report", staticmethod(explain))
    with pytest.raises(UserError) as caught:
        train(config)
    line = str(caught.value)
    assert line.startswith(
        "out of memory while explaining with callbacks.batch_size=8; callbacks.batch_size=4"
    )
    assert "2 steps are saved: the same command with resume=true goes on" in line


# Finding


def weights(folder):
    return torch.load(folder / CHECKPOINT, weights_only=True)


@pytest.mark.slow
def test_a_batch_is_worked_off_in_parts_that_fit(settings, monkeypatch, capsys):
    """And all else is as if the number of parts had been given."""
    with monkeypatch.context() as patched:
        tried = fits(patched, 4)
        folder = train(settings("name=found", "trainer.find_batch_size=true"))
    # 1, 2, 4 and 8 (which are 6, a part of 12), three steps each but the last; then two steps of the run.
    assert tried == [*[1] * 3, *[2] * 3, *[4] * 3, 6, *[4] * 6]
    results = json.loads((folder / RESULTS).read_text())
    assert results["found"] == {"batch_size": 4} and results["settings"]["trainer"]["find_batch_size"]
    assert (
        "4 samples fit in memory; the 12 of a step are worked off in 3 parts of 4" in capsys.readouterr().out
    )
    given = train(settings("name=given", "trainer.accumulate_grad_batches=3"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same_bits(weights(folder)[part], weights(given)[part]), part


def test_a_batch_that_fits_is_taken_at_once(settings, monkeypatch):
    tried = fits(monkeypatch, 100)
    folder = train(settings("trainer.find_batch_size=true"))
    assert json.loads((folder / RESULTS).read_text())["found"] == {"batch_size": 12}
    assert tried[-2:] == [12, 12] and max(tried) == 12


def test_not_even_one_sample_is_one_line(settings, monkeypatch):
    fits(monkeypatch, 0)
    with pytest.raises(UserError, match="not even one sample fits in memory"):
        train(settings("trainer.find_batch_size=true"))


@pytest.mark.slow
def test_a_learning_rate_is_found_and_trained_with(settings, monkeypatch, capsys):
    """The model, the random state and the optimiser begin as if the rate had been given."""
    monkeypatch.setattr(tuning, "_RATES", 30)
    joint = ("encoder.frozen=false", "encoder.learning_rate=1e-4")
    folder = train(settings("name=found", "trainer.find_learning_rate=true", *joint))
    rate = json.loads((folder / RESULTS).read_text())["found"]["learning_rate"]
    assert 1e-6 < rate < 1 and f"trainer.find_learning_rate: {rate:.3g}" in capsys.readouterr().out
    with Image.open(folder / "learning_rate.png") as picture:
        assert picture.size[0] > 500
    given = train(settings("name=given", f"training.learning_rate={rate!r}", *joint))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same_bits(weights(folder)[part], weights(given)[part]), part
    assert not list(folder.glob(".lr_find*"))


@pytest.mark.slow
def test_a_resumed_run_searches_nothing(settings, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "_RATES", 30)
    find = ("trainer.find_learning_rate=true", "name=stopped")
    as_it_is = GracefulInterrupt.on_train_batch_end

    def stopped(self, trainer, *others) -> None:
        self.interrupted = trainer.global_step == 1
        as_it_is(self, trainer, *others)

    with monkeypatch.context() as patched:
        patched.setattr(GracefulInterrupt, "on_train_batch_end", stopped)
        with pytest.raises(RunInterrupted):
            train(settings(*find))
    monkeypatch.setattr(tuning, "_learning_rate", None)
    folder = train(settings(*find, "resume=true"))
    rate = json.loads((folder / RESULTS).read_text())["found"]["learning_rate"]
    assert f"{rate:.3g}; see learning_rate.png (found when the run began" in " ".join(
        capsys.readouterr().out.split()
    )
    assert weights(folder)["lr_schedulers"][0]["base_lrs"][0] == rate


def test_the_model_is_afterwards_what_it_was(architecture, monkeypatch):
    model = training_models.tiny_model(architecture, frozen=False).train()
    model.mapper.eval()

    one = VQARun.__new__(VQARun)
    one.model, one.module = model, lambda: VQAModule(model, 1e-3, 0.0, 1, 2, ["other"])
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    with tuning._as_it_was(one) as module:
        torch.randn(5)
        for weight in module.parameters():
            weight.data += 1
            weight.grad = weight.data
        module.eval()
    assert torch.equal(torch.randn(3), expected) and same_bits(dict(model.state_dict()), state)
    assert all(weight.grad is None for weight in model.parameters())
    assert model.encoder.training and not model.mapper.training


def test_the_rate_where_the_loss_falls_fastest():
    rates = [10 ** (-6 + 6 * k / 99) for k in range(100)]
    # Flat, a fall around 1e-3 by log rate, then up.
    place = torch.tensor(rates).log10()
    losses = (1 - torch.sigmoid(4 * (place + 3)) + 5 * torch.sigmoid(8 * (place + 0.5))).tolist()
    assert tuning.steepest(rates, losses) == pytest.approx(1e-3, rel=0.2)
    assert tuning.steepest(rates, [float(k) for k in range(100)]) is None  # it never falls
    assert tuning.steepest(rates[:11], losses[:11]) is None


@pytest.mark.parametrize("fits_,parts", [(12, 1), (11, 2), (6, 2), (5, 3), (1, 12)])
def test_parts(fits_, parts):
    assert tuning._parts(12, fits_) == parts


@pytest.mark.parametrize("key", ["find_batch_size", "find_learning_rate"])
def test_not_by_several_processes(settings, monkeypatch, key):
    with pytest.raises(UserError, match=f"trainer.{key}: not with sharded weights"):
        settings("trainer.strategy=fsdp2", f"trainer.{key}=true")
    monkeypatch.setattr(tuning, "this_share", lambda: Share(0, 2))
    with pytest.raises(UserError, match=f"trainer.{key}: not by several processes"):
        run.train(settings(f"trainer.{key}=true"))
