"""Faults in the middle of a run, each made to happen: signals, kill -9, a full disk, damaged files, NaN."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import training_models
from support.training_models import same_bits

from clipmapper.commands.train import train
from clipmapper.errors import RunInterrupted, UserError
from clipmapper.tasks.registry import load
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.checkpoint import previous_of, restore_checkpoint, write_checkpoint
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

TINY_RUN = (
    *training_models.SMALL_RUN,
    "data.train_scenes=24",
    "data.simple_scenes=16",
    "training.max_steps=5",
    "training.warmup_steps=3",
    "training.blind_steps=1",
    "trainer.checkpoint_interval=1",
    "callbacks=none",
    "logger=csv",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
)


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    architecture = training_models.tiny_clip(tmp_path_factory.mktemp("clip"))
    return (f"encoder.architecture={architecture}", f"output={tmp_path_factory.mktemp('runs')}")


@pytest.fixture(scope="module")
def settings(common):
    return lambda *overrides: training_models.train_settings(*TINY_RUN, *common, *overrides)


@pytest.fixture(scope="module")
def whole(settings) -> dict:
    """Return the checkpoint at the end of training that nothing has disturbed."""
    return checkpoint(train(settings("name=whole")))


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / CHECKPOINT, weights_only=True)


def same_training(a: dict, b: dict) -> bool:
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    return all(same_bits(a[key], b[key]) for key in keys)


def run_folder(config) -> Path:
    (folder,) = Path(config.output, config.name).iterdir()
    return folder


def in_step(step: int, monkeypatch, action) -> None:
    """``action(loss)`` is the loss of that step, counted from 0."""
    original = VQAModule.training_step

    def training_step(module, batch, index):
        loss = original(module, batch, index)
        return action(loss) if module.global_step == step else loss

    monkeypatch.setattr(VQAModule, "training_step", training_step)


# Signals


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(settings, whole, monkeypatch):
    """Ctrl-C: tests/test_training.py."""
    stopped = settings("name=terminated", "trainer.checkpoint_interval=100")

    def send(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patched:
        in_step(2, patched, send)
        with pytest.raises(RunInterrupted, match="after step 3"):
            train(stopped)
    assert checkpoint(run_folder(stopped))["global_step"] == 3
    assert same_training(checkpoint(train(replace(stopped, resume=True))), whole)


SLOW_STEPS = """
import sys, time
from clipmapper.tasks.vqa.training import VQAModule
original = VQAModule.training_step
def training_step(module, batch, index):
    time.sleep(1000 if module.global_step == 3 else 0)
    return original(module, batch, index)
VQAModule.training_step = training_step
from clipmapper.cli import train
train(sys.argv[1:])
"""


@pytest.mark.slow
def test_kill_9_loses_at_most_the_interval(settings, common, whole, tmp_path):
    arguments = (*TINY_RUN, *common, "name=killed", "trainer.checkpoint_interval=2")
    arguments = [one for one in arguments if not one.startswith("callbacks.")]
    environment = {**os.environ, "PYTHONPATH": str(training_models.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SLOW_STEPS, *arguments], env=environment, cwd=tmp_path)
    config = settings("name=killed", "trainer.checkpoint_interval=2")
    try:
        deadline = time.monotonic() + training_models.PATIENCE
        while not list(Path(config.output).glob(f"killed/*/{CHECKPOINT}")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert checkpoint(run_folder(config))["global_step"] == 2
    assert same_training(checkpoint(train(replace(config, resume=True))), whole)


# Files


def some_checkpoint(step: int) -> dict:
    return {"global_step": step, "state_dict": {"weight": torch.full((100, 100), float(step))}}


def written(folder: Path, steps: int = 2) -> Path:
    path = folder / "last.ckpt"
    for step in range(1, steps + 1):
        write_checkpoint(some_checkpoint(step), path)
    return path


def test_the_one_before_is_kept_and_nothing_else(tmp_path):
    path = written(tmp_path, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "previous_last.ckpt"]
    assert torch.load(path, weights_only=True)["global_step"] == 3
    assert torch.load(previous_of(path), weights_only=True)["global_step"] == 2
    assert restore_checkpoint(path) is None


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_whole_checkpoint_is_there_at_every_moment(tmp_path, monkeypatch, moment):
    """Killed just before each call that puts something on the disk or gives it its name."""
    calls = 0
    original = getattr(os, moment)
    for killed_before in range(4):
        path = written(tmp_path / str(killed_before))
        calls = 0

        def call(*args, killed_before=killed_before):
            nonlocal calls
            if calls == killed_before:
                raise KeyboardInterrupt
            calls += 1
            return original(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, moment, call)
            try:
                write_checkpoint(some_checkpoint(3), path)
            except KeyboardInterrupt:
                assert killed_before < 2
            else:
                assert calls == 2
        restore_checkpoint(path)
        assert torch.load(path, weights_only=True)["global_step"] >= 2


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_full_disk_is_one_line_and_takes_nothing(tmp_path, steps):
    path = written(tmp_path, steps)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    path.with_name("last.ckpt.tmp").symlink_to("/dev/full")  # what is written there finds no room
    with pytest.raises(UserError, match="no room for a checkpoint") as caught:
        write_checkpoint(some_checkpoint(9), path)
    assert "No space left on device" in str(caught.value) and "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_full_disk_during_a_run(settings, whole, monkeypatch):
    config = settings("name=full")

    def fill_the_disk(loss):
        (run_folder(config) / CHECKPOINT.parent / "last.ckpt.tmp").symlink_to("/dev/full")
        return loss

    with monkeypatch.context() as patched:
        in_step(3, patched, fill_the_disk)
        with pytest.raises(UserError, match="no room for a checkpoint"):
            train(config)
    assert checkpoint(run_folder(config))["global_step"] == 3
    assert same_training(checkpoint(train(replace(config, resume=True))), whole)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "something else":
        torch.save([1, 2], path)
    else:
        path.unlink()


DAMAGE = ("cut", "empty", "one bit", "something else", "gone")


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path, how):
    path = written(tmp_path)
    damage(path, how)
    line = restore_checkpoint(path)
    assert line.startswith(f"{path}: ") and "going on from the one before, 1 steps" in line
    assert torch.load(path, weights_only=True)["global_step"] == 1
    write_checkpoint(some_checkpoint(2), path)  # the damaged one is not kept as the one before
    assert torch.load(previous_of(path), weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("how", DAMAGE[:-1])
def test_two_damaged_checkpoints_are_one_line(tmp_path, how):
    path = written(tmp_path)
    damage(path, "cut")
    damage(previous_of(path), how)
    with pytest.raises(UserError, match=r"resume=true: .*last\.ckpt: .*previous_last\.ckpt: ") as caught:
        restore_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_run_goes_on_from_the_one_before(settings, whole, monkeypatch, capsys):
    config = settings("name=damaged")

    def power_cut(loss):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        in_step(4, patched, power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    damage(run_folder(config) / CHECKPOINT, "cut")
    folder = train(replace(config, resume=True))
    printed = capsys.readouterr().out
    assert "going on from the one before, 3 steps" in printed
    assert "after step 3 of 5" in " ".join(printed.split())
    assert same_training(checkpoint(folder), whole)
    assert not previous_of(folder / CHECKPOINT).exists()  # the run is finished


# Numbers that are none


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("the loss", lambda loss: loss * torch.nan),
        pytest.param("the loss", lambda loss: loss + torch.inf, marks=pytest.mark.slow),
        pytest.param("the gradient", NanGradient.apply, marks=pytest.mark.slow),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_nan_stops_before_the_step(settings, whole, monkeypatch, request, what, spoil):
    """And when what made it is mended, the run goes on as if it had never been."""
    config = settings(f"name={request.node.callspec.id}", "trainer.checkpoint_interval=100")
    seen = []
    original = VQAModule.training_step

    def training_step(module, batch, index):
        if module.global_step == 3:
            seen.extend(batch["ids"])
        return original(module, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(VQAModule, "training_step", training_step)
        in_step(3, patched, spoil)
        with pytest.raises(UserError, match=rf"^{what} of step 4 is not a finite number") as caught:
            train(config)
    line = str(caught.value)
    assert line.endswith(f"Samples: {', '.join(seen)}") and len(seen) == 16 and "\n" not in line
    kept = run_folder(config) / CHECKPOINT
    assert str(kept) in line and checkpoint(run_folder(config))["global_step"] == 3
    assert all(weight.isfinite().all() for weight in load(kept).parameters())
    assert not (run_folder(config) / RESULTS).exists()
    if "nan" in kept.parts:
        assert same_training(checkpoint(train(replace(config, resume=True))), whole)


# SLURM


@pytest.mark.slow
def test_requeued_job_goes_on_with_its_run(settings, whole, monkeypatch, tmp_path):
    """A job that SLURM is about to end saves, is put into the queue again, and resumes when it is started."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "called"}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    of_job = {
        "JOB_ID": "17",
        "NTASKS": "1",
        "JOB_NAME": "train",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }
    for name, value in of_job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    config = settings("name=queued", "trainer.checkpoint_interval=100")

    def warn_of_the_end(loss):
        os.kill(os.getpid(), signal.SIGUSR1)
        return loss

    with monkeypatch.context() as patched:
        in_step(2, patched, warn_of_the_end)
        with pytest.raises(RunInterrupted):
            train(config)
    assert (tmp_path / "called").read_text() == "requeue 17\n"
    folder = run_folder(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(config) == folder and same_training(checkpoint(folder), whole)
    assert json.loads((folder / RESULTS).read_text())["name"] == "queued"
    assert train(config) != folder  # that run is finished
