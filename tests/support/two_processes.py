"""Several training commands one behind the other in the same two processes: ``two_processes.py JSON``.

A command with ``stop_after=N`` is told to stop behind step N: as by SIGTERM, in the second process alone.

What is started by Lightning has the same command line, with settings of Hydra's behind it. What
``trainer.compile`` asks for is traced, but what was traced is run as it is: no C++ compiler is needed.
"""

import functools
import json
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress

from torch import nn
from torch.fx import GraphModule

from clipmapper import cli
from clipmapper.training.interruption import GracefulInterrupt
from clipmapper.training.processes import is_main

graphs: list[GraphModule] = []


def as_traced(graph: GraphModule, _inputs: list) -> Callable:
    graphs.append(graph)
    return graph.forward


nn.Module.compile = functools.partialmethod(nn.Module.compile, backend=as_traced)
as_it_is = GracefulInterrupt.on_train_batch_end


def stopped_after(self: GracefulInterrupt, step: int, trainer, *others) -> None:
    if trainer.global_step == step and not is_main():
        self._ask(signal.SIGTERM, None)
    as_it_is(self, trainer, *others)


for overrides in json.loads(sys.argv[1]):
    steps = [one for one in overrides if one.startswith("stop_after=")]
    kept = [one for one in overrides if one not in steps]
    GracefulInterrupt.on_train_batch_end = as_it_is
    if steps:
        step = int(steps[0].partition("=")[2])
        GracefulInterrupt.on_train_batch_end = functools.partialmethod(stopped_after, step)
    with suppress(SystemExit) if steps else nullcontext():
        cli.train([*kept, "trainer.devices=2"])
print(f"{len(graphs)} graphs compiled")
