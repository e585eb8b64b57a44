"""Weights, gradients and optimiser state in shards, one a process (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every transformer block of ``module.model`` by itself, and all the rest together.

    A block's weights are gathered while it computes. The rest is gathered for a whole ``training_step``:
    modules of the rest are called in too many ways to be told apart.
    """
    encoder, mapper = module.model.encoder, module.model.mapper
    for block in (
        *encoder.image_tower.attention_blocks(),
        *encoder.text_tower.attention_blocks(),
        *mapper.blocks,
    ):
        fully_shard(block, mesh=mesh)
        for method in ("image_alone", "image_keys_values", "text_step"):
            if hasattr(block, method):
                register_fsdp_forward_method(block, method)
    # FSDP takes no scalars: CLIP's logit scale and bias, in which tokens have no part.
    scalars = {weight for weight in module.parameters() if weight.ndim == 0}
    fully_shard(module, mesh=mesh, ignored_params=scalars)
    register_fsdp_forward_method(module, "training_step")


def with_state_of_all(optimiser: torch.optim.AdamW) -> None:
    """Give every weight the state that AdamW begins with, also one that never gets a gradient.

    AdamW gives a weight its state with its first gradient. A checkpoint of shards in which a trained weight
    has none (CLIP's projections, which no token passes) is refused by torch when it is loaded.
    """
    for group in optimiser.param_groups:
        for weight in group["params"]:
            averages = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[weight] = {"step": torch.tensor(0.0), **averages}


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights: it may use them without the others (nothing if not sharded).

    Validation needs that: captions end at different words in different processes. To be entered by all
    processes at once.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            # As fully_shard has it: the root, which is needed first in the backward, stays gathered.
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()
