"""Several training commands one behind the other in the same two processes: ``two_processes.py JSON``.

What is started by Lightning has the same command line, with settings of Hydra's behind it. What
``trainer.compile`` asks for is traced, but what was traced is run as it is: no C++ compiler is needed.
"""

import functools
import json
import sys
from collections.abc import Callable

from torch import nn
from torch.fx import GraphModule

from clipmapper import cli

graphs: list[GraphModule] = []


def as_traced(graph: GraphModule, _inputs: list) -> Callable:
    graphs.append(graph)
    return graph.forward


nn.Module.compile = functools.partialmethod(nn.Module.compile, backend=as_traced)
for overrides in json.loads(sys.argv[1]):
    cli.train([*overrides, "trainer.devices=2"])
print(f"{len(graphs)} graphs compiled")
