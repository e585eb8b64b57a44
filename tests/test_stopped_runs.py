"""Runs that are told to stop, or lose a part of themselves: what is saved, what is said, what is left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import training_models
from support.slow import mostly_slow
from support.training_models import PATIENCE, same_bits

from clipmapper.commands.train import train
from clipmapper.errors import RunInterrupted
from clipmapper.host.stopping import Stopped
from clipmapper.tasks.vqa.training import VQAModule
from clipmapper.training.run_folder import CHECKPOINT, RESULTS

TINY_RUN = (
    *(one for one in training_models.SMALL_RUN if not one.startswith("callbacks.")),
    "data.train_scenes=24",
    "data.simple_scenes=16",
    "training.max_steps=4",
    "training.warmup_steps=3",
    "training.blind_steps=0",
    "trainer.val_check_interval=2",
    "trainer.checkpoint_interval=100",
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
def whole(settings) -> Path:
    return train(settings("name=whole"))


def numbers(folder: Path) -> dict:
    """All results of a run that do not tell where and how long; of files with answers, what is in them."""
    results = json.loads((folder / RESULTS).read_text())
    answers = {split: json.loads(Path(file).read_text()) for split, file in results["answers"].items()}
    return {
        key: value for key, value in results.items() if key not in ("name", "settings", "files", "seconds")
    } | {"answers": answers}


def same_end(folder: Path, whole: Path) -> bool:
    states = [torch.load(one / CHECKPOINT, weights_only=True)["state_dict"] for one in (folder, whole)]
    return same_bits(*states) and numbers(folder) == numbers(whole)


def in_validation(monkeypatch, step: int, *signals: signal.Signals) -> list[int]:
    """Send them in the first batch of the validation behind that step; the list counts batches from there."""
    original, batches = VQAModule.validation_step, []

    def validation_step(module, *arguments, **options):
        if module.global_step == step:
            batches.append(step)
            for number in signals if len(batches) == 1 else ():
                os.kill(os.getpid(), number)
        return original(module, *arguments, **options)

    monkeypatch.setattr(VQAModule, "validation_step", validation_step)
    return batches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number"),
    mostly_slow([(2, signal.SIGTERM), (4, signal.SIGHUP)], 2),
    ids=["in the middle", "last"],
)
def test_validation_stops_between_two_batches(settings, whole, monkeypatch, request, step, number):
    """And is made again when the run goes on, though the checkpoint is of the step before it."""
    config = settings(f"name={request.node.callspec.id}")
    with monkeypatch.context() as patched:
        batches = in_validation(patched, step, number)
        with pytest.raises(RunInterrupted) as caught:
            train(config)
    assert batches == [step]
    assert str(caught.value) == (
        f"stopped in the validation after step {step}; {step} steps are saved: the same command with "
        "resume=true goes on"
    )
    assert same_end(train(replace(config, resume=True)), whole)


@pytest.mark.slow
def test_ctrl_c_twice_in_the_last_validation(settings, whole, monkeypatch):
    """Before the first saving by interval: what is promised is there."""
    config = settings("name=twice")
    with monkeypatch.context() as patched:
        in_validation(patched, 4, signal.SIGINT, signal.SIGINT)
        with pytest.raises(
            RunInterrupted, match=r"^stopped at once; 4 steps are saved: .* resume=true goes on"
        ):
            train(config)
    assert same_end(train(replace(config, resume=True)), whole)


def test_ctrl_c_twice_before_anything_is_saved(settings, monkeypatch):
    config = settings("name=nothing")
    original = VQAModule.training_step

    def training_step(module, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return original(module, *arguments)

    monkeypatch.setattr(VQAModule, "training_step", training_step)
    with pytest.raises(
        RunInterrupted, match=r"^stopped at once; nothing was saved: there is nothing to resume$"
    ):
        train(config)


EXPLAINED = (
    "callbacks=relevance",
    "callbacks.samples=4",
    "callbacks.pictures=1",
    "callbacks.methods=[weighted,random]",
    "callbacks.every_n_validations=1",
)


@pytest.mark.slow
def test_explanations_stop_between_two_parts(settings, monkeypatch):
    from clipmapper.tasks.vqa import report as explanation_report

    config, whole = settings("name=explaining", *EXPLAINED), train(settings("name=explained", *EXPLAINED))
    original, parts = explanation_report.answer_maps, []

    def maps(*arguments, **options):
        parts.append(arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(explanation_report, "answer_maps", maps)
        with pytest.raises(
            RunInterrupted, match=r"^stopped in the explanations after step 2; 2 steps are saved"
        ):
            train(config)
    assert len(parts) == 1
    assert same_end(train(replace(config, resume=True)), whole)
    assert "explanations" in numbers(whole)


# Whole programs. Each step is slow enough to be hit.

SLOW_STEPS = """
import sys, time
from clipmapper.tasks.vqa.training import VQAModule
original = VQAModule.training_step
def training_step(module, batch, index):
    time.sleep(0.1)
    return original(module, batch, index)
VQAModule.training_step = training_step
from clipmapper.cli import train
train(sys.argv[1:])
"""


class Program:
    """``train`` with images that workers decode, in a process group of its own."""

    def __init__(self, folder: Path, common: tuple[str, ...], *overrides: str) -> None:
        rows = []
        for number in range(24):
            Image.new("RGB", (40, 40), (10 * number, 0, 0)).save(folder / f"{number}.png")
            split = "train" if number < 16 else "validation"
            rows.append(
                {
                    "id": number,
                    "image": f"{number}.png",
                    "question": "what?",
                    "answers": [("red", "blue")[number % 2]],
                    "split": split,
                }
            )
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        scenes = [one for one in TINY_RUN if not one.startswith("data.")]
        arguments = [
            *(*scenes, *common, "data=manifest", f"data.path={folder}/data.jsonl", "data.workers=2"),
            *("training.max_steps=100000", "trainer.val_check_interval=100000"),
            *("trainer.checkpoint_interval=3", f"output={folder}", "name=run", *overrides),
        ]
        # A file: the command line by which a further process is started too.
        script = folder / "slow_steps.py"
        script.write_text(SLOW_STEPS)
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, "PYTHONPATH": str(training_models.ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,
        )
        self.place = folder / "run"

    def saved(self) -> "Program":
        """The same, once it has saved something."""
        self.wait_for(lambda: list(self.place.glob(f"*/{CHECKPOINT}")))
        return self

    @property
    def folder(self) -> Path:
        (folder,) = self.place.iterdir()
        return folder

    def wait_for(self, true) -> None:
        last = time.monotonic() + PATIENCE
        while not true():
            assert self.process.poll() is None and time.monotonic() < last, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def members(self) -> list[int]:
        """All processes of its group that run."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,stat=", "-g", str(self.process.pid)], capture_output=True, text=True
        )
        states = [line.split() for line in listed.stdout.splitlines()]
        return [int(pid) for pid, state in states if not state.startswith("Z")]

    def end(self) -> tuple[int, str]:
        """Its status and its last words, behind which none of its processes is left."""
        status = self.process.wait(PATIENCE)
        last = time.monotonic() + 20
        while (left := self.members()) and time.monotonic() < last:
            time.sleep(0.2)
        assert not left
        return status, re.split(r"(?=interrupted: |error: )", self.said())[-1]

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()


@pytest.fixture
def program(tmp_path, common):
    programs = []

    def start(*overrides: str) -> Program:
        programs.append(Program(tmp_path, common, *overrides))
        return programs[-1].saved()

    yield start
    for one in programs:
        one.close()


GOES_ON = r"(\d+) steps are saved: the same command with resume=true goes on\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name
)
def test_a_signal_to_the_group_leaves_the_workers_their_work(program, number):
    run = program()
    os.killpg(run.process.pid, number)
    status, line = run.end()
    told = re.fullmatch(rf"interrupted: stopped after step (\d+); {GOES_ON}", line)
    assert status == 130 and told and told[1] == told[2], line
    assert torch.load(run.folder / CHECKPOINT, weights_only=True)["global_step"] == int(told[1])


@pytest.mark.slow
def test_no_worker_outlives_a_run_that_was_killed(program):
    run = program()
    run.wait_for(lambda: len(run.members()) >= 3)
    run.process.kill()
    assert run.end()[0] == -signal.SIGKILL


@pytest.mark.slow
def test_a_worker_that_was_killed_is_one_line(program):
    run = program()
    run.wait_for(lambda: len(run.members()) >= 3)
    os.kill(max(run.members()), signal.SIGKILL)
    status, line = run.end()
    assert status == 2, line
    # (Who sees it first, torch's signal handler or its watch on the loader, words it differently.)
    how = r"(was killed \(\w+\)|has ended unexpectedly)"
    assert re.fullmatch(rf"error: a process that makes batches {how}; .*{GOES_ON}", line), line


def the_other(run: Program) -> int:
    """The second process of two."""
    for pid in run.members():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if b"LOCAL_RANK=1" in environment:
            return pid
    raise AssertionError("there is no second process")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "line"),
    [
        (signal.SIGKILL, r"process 1 of 2 has ended \(signal 9\)"),
        (signal.SIGSTOP, r"process 1 of 2 \(process id \d+\) is stopped: no answer for 0.1 minutes .*"),
    ],
    ids=["killed", "stopped"],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_another_process_is_named(program, how, line):
    run = program("trainer.devices=2", "data.workers=0", "trainer.timeout_minutes=0.1")
    os.kill(the_other(run), how)
    status, said = run.end()
    assert status == 2
    assert re.fullmatch(rf"error: {line}; the run can't go on without it\. {GOES_ON}", said), said


def test_what_stops_a_command_is_a_keyboard_interrupt():
    """So that what catches Ctrl-C, here and in libraries, catches it."""
    assert issubclass(Stopped, KeyboardInterrupt)
