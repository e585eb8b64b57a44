"""A device that is out of memory, in a line: with what, how much was taken, and which settings help."""

import re

import torch

from clipmapper.settings.schema import TrainConfig
from clipmapper.training.processes import this_share


def out_of_memory(error: BaseException) -> bool:
    """Whether a device is. Older releases, libraries and other devices say so in a ``RuntimeError``."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and re.search(r"(CUDA|MPS|HIP|XPU)\b.*out of memory|CUDA_ERROR_OUT_OF_MEMORY", str(error)) is not None
    )


def memory_line(config: TrainConfig) -> str:
    """The line for one in training or validation."""
    training, trainer = config.training, config.trainer
    parts = trainer.accumulate_grad_batches
    at_a_time = training.batch_size // (this_share().of * parts)
    of = "" if at_a_time == training.batch_size else f", {at_a_time} at a time"
    more = next(
        (n for n in range(2 * parts, training.batch_size + 1) if _divides(n, training.batch_size)), None
    )
    ways = (
        [] if more is None else [f"trainer.accumulate_grad_batches={more} trains the same in smaller parts"]
    )
    if training.batch_size > 1:
        ways.append(f"training.batch_size={training.batch_size // 2} takes less")
    help_ = "; ".join(ways) or "a smaller encoder or model takes less"
    return f"out of memory with training.batch_size={training.batch_size}{of}{taken()}; {help_}"


def explaining_line(batch_size: int) -> str:
    """The line for one in explanations."""
    return (
        f"out of memory while explaining with callbacks.batch_size={batch_size}{taken()}; "
        f"callbacks.batch_size={max(1, batch_size // 2)} takes less, callbacks=none nothing"
    )


def taken() -> str:
    """How much of the device's memory was taken at most, where that is known."""
    if not torch.cuda.is_available():
        return ""
    gib = 2**30
    peak = torch.cuda.max_memory_allocated() / gib
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / gib
    return f" (at most {peak:.1f} of {whole:.1f} GiB were taken)"


def _divides(parts: int, batch_size: int) -> bool:
    return batch_size % (parts * this_share().of) == 0
