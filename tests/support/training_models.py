"""Small training runs for tests: settings, models and data of seconds, and runs of the real scripts."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipmapper.commands.compose import train_settings as composed
from clipmapper.data.world.data import ScenesVQA
from clipmapper.data.world.questions import ANSWERS
from clipmapper.settings.schema import TrainConfig
from clipmapper.tasks.vqa.model import CLIPmapper, build_clipmapper

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1800  # seconds for what takes seconds: the machine may be busy, but nothing waits for ever
TINY_MAPPER = {
    "mapper": "dual_flow",
    "width": 16,
    "depth": 1,
    "heads": 2,
    "mlp_ratio": 2.0,
    "head_width": 16,
    "image_position_embedding": True,
}
GRID = (3, 3)

# Settings of a whole run in a few seconds; what is not here is as shipped. Weights are random.
SMALL_RUN = (
    "encoder.pretrained=null",
    "data.train_scenes=60",
    "data.simple_scenes=40",
    "data.validation_scenes=40",
    "data.held_out_scenes=40",
    "training.max_steps=6",
    "training.batch_size=16",
    "training.blind_steps=5",
    "callbacks.samples=8",
    "callbacks.pictures=1",
)


def tiny_clip(folder: Path) -> str:
    """The path of a CLIP's configuration for the built-in scenes: 9 patches, 1 + 1 layers, real tokenizer."""
    path = Path(folder) / "tiny-scenes-clip-for-tests.json"
    vision = {"image_size": 72, "patch_size": 24, "layers": 1, "width": 16, "head_width": 8}
    text = {"context_length": 48, "vocab_size": 49408, "width": 12, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    return str(path)


def tiny_model(architecture: str, *, seed: int = 0, frozen: bool = True, **mapper) -> CLIPmapper:
    """A CLIPmapper on :func:`tiny_clip`, answers in the vocabulary of the built-in scenes.

    CLIP's initial weights are so small that every token looks alike; these are not.
    """
    encoder = {"architecture": architecture, "pretrained": None, "frozen": frozen}
    torch.manual_seed(seed)
    model = build_clipmapper(encoder, TINY_MAPPER | mapper, ANSWERS)
    spread_out(model.encoder.clip, seed)
    return model


@torch.no_grad()
def spread_out(clip: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in clip.parameters():
        if weight.ndim >= 2:
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise if weight.shape[0] == 49408 else noise * weight[0].numel() ** -0.5)


@functools.cache
def small_scenes() -> ScenesVQA:
    return ScenesVQA(
        train_scenes=40, simple_scenes=20, validation_scenes=30, held_out_scenes=30, train_questions=1, seed=0
    )


def picture(number: int) -> np.ndarray:
    """The image of a scene of :func:`small_scenes`, UInt8[height, width, 3]."""
    records = small_scenes().validation
    first, _ = records.first_of_images()
    return records[int(first[number])].image.pixels


def train_settings(*overrides: str) -> TrainConfig:
    """The settings of ``clipmapper train`` as the command line would compose them; a later one wins."""
    if "callbacks=none" in overrides:
        overrides = tuple(one for one in overrides if not one.startswith("callbacks."))
    return composed(*overrides)


def settings_of_run(run: Sequence[str], architecture: str, folder: Path) -> Callable[..., TrainConfig]:
    """Makes the settings of runs in ``folder``, as ``run`` has them and with what is given besides.

    ``callbacks=relevance`` takes the place of ``callbacks=none``.
    """
    where = (f"encoder.architecture={architecture}", f"output={folder}")

    def with_these(*overrides: str) -> TrainConfig:
        mine = [one for one in run if one != "callbacks=none" or "callbacks=relevance" not in overrides]
        return train_settings(*mine, *where, *overrides)

    return with_these


def same_bits(a: object, b: object) -> bool:
    """Whether two checkpoints (or parts of them) are equal to the last bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and a == b


@dataclass(frozen=True)
class Finished:
    """A process that has ended, and what it was started in."""

    status: int
    printed: str
    errors: str
    folder: Path

    @property
    def run_folder(self) -> Path:
        """The folder of a training run, from the first line that it printed."""
        return self.folder / re.match(r"Run (\S+)", self.printed)[1]


def script(name: str, *arguments: str, folder: Path) -> Finished:
    """``python scripts/name.py …`` in a process of its own, with ``folder`` as working directory."""
    return _process([sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments], folder)


def console_command(*arguments: str, folder: Path) -> Finished:
    """``clipmapper …`` as pip installs it."""
    return _process([str(Path(sysconfig.get_path("scripts")) / "clipmapper"), *arguments], folder)


def _process(command: list[str], folder: Path) -> Finished:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_DATA_DIR": str(folder / "wandb-data")}
    for name in (
        "HYDRA_FULL_ERROR",
        "WANDB_MODE",
        "WANDB_SERVICE",
        "WANDB_SILENT",
    ):  # as for a user who has set nothing
        environment.pop(name, None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as process:
        try:
            printed, errors = process.communicate(timeout=PATIENCE)
        except BaseException:
            # With what it has started, which has the pipes open as well and may wait for it for ever.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return Finished(process.returncode, printed, errors, folder)


_trained: list[Finished] = []


def trained_by_script(folders: pytest.TempPathFactory) -> Finished:
    """One run of ``scripts/train.py`` that all tests share (a factory of folders is no key of a cache)."""
    if not _trained:
        _trained.append(script("train", *SMALL_RUN, folder=folders.mktemp("trained")))
    assert _trained[0].status == 0, _trained[0].errors
    return _trained[0]
