"""Starting the processes of a run, or taking one's place among those that a launcher has started."""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from subprocess import Popen
from typing import NamedTuple, Protocol, runtime_checkable

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.environments import ClusterEnvironment
from torch import distributed

from clipmapper.errors import UserError
from clipmapper.training.processes import Companions, form_group, is_main

# Until all have read their libraries, from a disk that is busy with them: the setting is for later.
_JOINING = timedelta(minutes=10)


class Started(NamedTuple):
    """Who has started this process, and how many: ``rank`` of ``count``, ``local`` of this machine's."""

    by: str
    count: int
    rank: int
    local: int


@runtime_checkable
class Devices(Protocol):
    """The settings of devices: those of ``trainer``, or of another command."""

    accelerator: str
    devices: str
    num_nodes: int
    timeout_minutes: float


def start_processes(trainer: Devices, named: str = "trainer.") -> tuple[torch.device, Companions]:
    """Make this process one of as many as there are devices; returns the one that is its own, and who
    watches over the others. ``named``: what its settings' names begin with in messages.

    They are started here (by Lightning, with this process's own command line), unless ``torchrun`` or SLURM
    has started them. Raises ``UserError`` where those have started another number than the settings say, and
    in a Hydra sweep, whose command line stands for many runs.
    """
    started = started_by()
    wanted = _devices(trainer.devices)
    if wanted is not None:
        _check_count(trainer, started, wanted, named)
    timeout = timedelta(minutes=trainer.timeout_minutes)

    def fabric(**options) -> lightning.Fabric:
        return lightning.Fabric(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            plugins=cluster(),
            **options,
        )

    try:
        found = fabric()
        if wanted is None:
            _check_count(trainer, started, getattr(found.strategy, "num_processes", 1), named)
        if found.world_size > 1:
            found = fabric(strategy=DDPStrategy(timeout=max(timeout, _JOINING)))
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        line = f"{named.rstrip('.') or 'devices'}: {str(error).splitlines()[0]}"
        _one_says(line, started is None or started.local == 0)
    if found.world_size == 1:
        return found.device, Companions()
    launcher = found.strategy.launcher
    if launcher is not None and _in_sweep():
        raise UserError(
            f"--multirun with {found.world_size} processes a run: each would be started with the sweep's "
            f"command line; use {named}devices=1, or a launcher that starts them itself "
            "(hydra/launcher=submitit_slurm)"
        )
    with less_noise(), _joining(found.world_size) as children:
        _launch(found.launch)
        form_group(timeout)
    companions = Companions.of_this_machine(children)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as this process lives
    return found.device, companions


def cluster() -> list[ClusterEnvironment]:
    """Plugins for Lightning. On SLURM a run itself saves and goes back into the queue (interruption.py)."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def started_by() -> Started | None:
    """Read the environment; None where nobody but the user has started this process.

    Lightning tells the processes that it starts in the same variables, and finds them right.
    """

    def number(name: str, otherwise: int = 0) -> int:
        return int(os.environ.get(name) or otherwise)

    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return Started("torchrun", number("WORLD_SIZE", 1), number("RANK"), number("LOCAL_RANK"))
        if SLURMEnvironment.detect():
            return Started(
                "SLURM", number("SLURM_NTASKS", 1), number("SLURM_PROCID"), number("SLURM_LOCALID")
            )
        if {"WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
            local = number("LOCAL_RANK")
            return Started("the launcher", number("WORLD_SIZE", 1), number("RANK", local), local)
    except ValueError as error:
        raise UserError(f"the environment of torchrun or SLURM: {error}") from error
    return None


def _devices(given: str) -> int | None:
    """How many devices of a machine the setting asks for; None for all that there are."""
    if given in ("auto", "-1"):
        return None
    return len(given.split(",")) if "," in given else int(given)


def _check_count(trainer: Devices, started: Started | None, devices: int, named: str) -> None:
    wanted = devices * trainer.num_nodes
    if started is None or started.count == wanted:
        return
    fits = (
        f"give {named}devices={started.count // trainer.num_nodes}"
        if started.count % trainer.num_nodes == 0
        else f"give {named}devices and {named}num_nodes whose product it is"
    )
    _one_says(
        f"{named}devices: {started.by} has started {started.count} "
        f"process{'es' if started.count > 1 else ''}, but {devices} devices × {trainer.num_nodes} machines "
        f"({named}num_nodes) are {wanted}; {fits}, or start {wanted}",
        started.rank == 0,
    )


def _one_says(line: str, this_one: bool) -> None:
    if this_one:
        raise UserError(line)
    raise SystemExit(2)


def _launch(launch: Callable[[], object]) -> None:
    """Raises ``UserError`` where the processes don't find each other."""
    try:
        launch()
    except distributed.DistError as error:
        raise UserError(
            f"the processes of this run do not find each other: {str(error).splitlines()[0]}"
        ) from error
    except ValueError as error:  # of torchrun's or SLURM's variables
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from error


@contextmanager
def _joining(count: int) -> Iterator[list[Popen]]:
    """The processes that Lightning starts within; until all have found each other none waits for a dead one.

    Lightning's own watch over them would kill all, this one too, without a word.
    """
    children: list[Popen] = []
    joined = threading.Event()
    parent = os.getppid()

    def watch() -> None:
        while not joined.wait(0.5):
            dead = [(rank, child) for rank, child in enumerate(children, 1) if child.poll() is not None]
            if dead or os.getppid() != parent:
                rank, child = dead[0] if dead else (0, None)
                how = f" (status {child.returncode})" if child else ""
                line = f"process {rank} of {count} has ended{how} before the run began"
                print("error:", line, file=sys.stderr, flush=True)
                for other in children:
                    other.kill()
                os._exit(2)

    observe = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = children.extend
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield children
    finally:
        joined.set()
        subprocess_script._launch_process_observer = observe


def _in_sweep() -> bool:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextmanager
def less_noise() -> Iterator[None]:
    """Keep away what Lightning says at every start and a user can do nothing about."""
    # Some of what Fabric says at the start of several processes, the trainer's logger says.
    loggers = [logging.getLogger(f"lightning.{speaker}") for speaker in ("fabric", "pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for expected in (
            "Found .* module.* in eval mode",  # the frozen encoder is meant to be
            "Checkpoint directory .* exists and is not empty",  # of a run that is resumed
            ".*does not have many workers",  # batches are rows of a cache: a worker would only copy them
            "You're using the WeightAveraging callback with a model that overrides",  # which makes no layers
            "FSDP2-wrapped module .* returned a view",  # which nothing here changes in place
            "It is recommended to use .self.log.*sync_dist",  # metrics are the same in all processes already
            ".broadcast_buffers. is deprecated",  # what replaces it is not in all releases that will do
            ".*isinstance.treespec, LeafSpec.. is deprecated",  # Lightning's own use of torch
        ):
            warnings.filterwarnings("ignore", expected)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
