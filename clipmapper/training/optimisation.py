"""The optimiser and its schedule, the same for every model that is trained here."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn


def adamw(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    fused: bool | None = None,
    scales: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """AdamW over what takes a gradient; no decay on norms, biases, embeddings' vectors and scalars.

    ``scales``: of the learning rate, of parameters that have another than 1.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    trained = [p for p in module.parameters() if p.requires_grad]
    for weight in sorted(trained, key=lambda p: p.ndim < 2):  # with decay first; otherwise in their order
        key = (weight_decay if weight.ndim >= 2 else 0.0, scales.get(weight, 1.0))
        groups.setdefault(key, []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": decay, "lr": learning_rate * scale}
            for (decay, scale), weights in groups.items()
        ],
        lr=learning_rate,
        betas=betas,
        fused=fused,
    )


def warmup_cosine(
    optimiser: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a half cosine to zero; stepped once an optimiser step."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
