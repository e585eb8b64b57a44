"""The part that the modules of all tasks share: the model, its optimiser, its shards, its description."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from clipmapper.models.encoder import learning_rate_scales, without_adapters
from clipmapper.models.exported import DESCRIPTION
from clipmapper.models.tokens import TokenizedText
from clipmapper.training.best import KeepBest
from clipmapper.training.processes import sum_of_all, this_share


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
    if isinstance(module, FSDPModule):
        # A validation before the first step calls blocks before the root, which has to be set up first.
        module._get_fsdp_state()._lazy_init()
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


class TaskModule(lightning.LightningModule):
    """A model in training: AdamW, warm-up, cosine, in steps. A batch is a dictionary.

    ``layer_decay``: of the encoder's learning rates
    (:func:`clipmapper.models.encoder.learning_rate_scales`). ``encoder_learning_rate``: of the encoder, None:
    that of all. ``frozen_steps``: how many steps the encoder rests at first; its rate then rises as that of
    the others did. All are to be set before ``fit``.
    """

    layer_decay = 1.0
    encoder_learning_rate: float | None = None
    frozen_steps = 0

    def __init__(
        self, model: nn.Module, learning_rate: float, weight_decay: float, warmup_steps: int, max_steps: int
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.max_steps = warmup_steps, max_steps
        self._plain = ExitStack()

    def configure_optimizers(self) -> dict:
        encoder, own = self.model.encoder, self.encoder_learning_rate
        whole = 1.0 if own is None else own / self.learning_rate
        scales = learning_rate_scales(encoder, self.layer_decay, whole)
        later = set(encoder.parameters()) if self.frozen_steps else ()
        whole_here = not isinstance(self, FSDPModule)
        optimiser = adamw(
            self.model,
            self.learning_rate,
            self.weight_decay,
            scales=scales,
            later=later,
            begins=self.frozen_steps,
            # A trained encoder has the vectors of its whole vocabulary to move: on CPUs, a tenth of a step.
            # (Lightning clips no gradients for it where they are scaled, which they are on GPUs alone.)
            fused=(not encoder.frozen and whole_here and self.model.device.type == "cpu") or None,
        )
        if not whole_here:
            with_state_of_all(optimiser)
        schedule = warmup_cosine(optimiser, self.warmup_steps, self.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            shard(self, self.device_mesh["data_parallel"])

    def compile_trained(self) -> None:
        """``torch.compile`` what training runs, part by part, so that names of weights stay as they are."""
        encoder = self.model.encoder
        towers = () if encoder.frozen else (encoder.image_tower, encoder.text_tower)
        blocks = [block for tower in towers for block in tower.attention_blocks()]
        for part in (*blocks, *self.model.mapper.blocks, self.model.head):
            part.compile()

    def on_fit_start(self) -> None:
        # Lightning trains every part in the mode that it finds it in, and a CLIP comes in evaluation mode.
        # (What is frozen stays in it: see ClipEncoder.train.)
        self.train()

    def on_train_batch_start(self, batch: dict, index: int) -> None:
        self.model.encoder.resting = self.trainer.global_step < self.frozen_steps

    def on_train_batch_end(self, *_) -> None:
        self.model.encoder.resting = False  # explanations need its gradients

    def on_before_optimizer_step(self, optimiser: torch.optim.Optimizer) -> None:
        # Words that don't pass the text tower are its embeddings all the same. What has no gradient has no
        # part in the norm that is clipped, and AdamW leaves it and its state as they are.
        if self.model.encoder.resting:
            for weight in self.model.encoder.parameters():
                weight.grad = None

    def on_validation_start(self) -> None:
        """Validate and explain with a plain model: whole, without adapters, and not compiled."""
        self._plain.enter_context(gathered(self))
        self._plain.enter_context(without_adapters(self.model.encoder))
        self._plain.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_end(self) -> None:
        self.leave_validation()
        for callback in self.trainer.callbacks:
            if isinstance(callback, KeepBest):
                callback.save(self.trainer)

    def leave_validation(self) -> None:
        """Also of one that was broken off; without one it does nothing."""
        self._plain.close()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint[DESCRIPTION] = self.model.description

    def terms(self, batch: dict) -> int | float:
        """How many terms the loss of a batch is the mean of."""
        return len(batch["ids"])

    def weight(self, batch: dict) -> float:
        """Weigh the loss of a part, so that the mean over parts is the loss of the whole batch.

        Processes and accumulated gradients average the means of their parts as if each had equally many
        terms: of questions they have, of captions, whose terms are words, they have not.
        """
        parts = this_share().of * batch.get("parts", 1)
        return 1.0 if parts == 1 else self.terms(batch) * parts / sum_of_all(batch["parts_terms"])

    def transfer_batch_to_device(self, batch, device: torch.device, dataloader_idx: int):
        return {k: v.to(device) if isinstance(v, Tensor | TokenizedText) else v for k, v in batch.items()}


def adamw(
    module: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    fused: bool | None = None,
    scales: Mapping[nn.Parameter, float] = MappingProxyType({}),
    later: Collection[nn.Parameter] = (),
    begins: int = 0,
) -> torch.optim.AdamW:
    """AdamW over what takes a gradient; no decay on norms, biases, embeddings' vectors and scalars.

    ``scales``: of the learning rate, of parameters that have another than 1. ``later``: those that are
    trained from step ``begins`` on only; their groups say so, to :func:`warmup_cosine`.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    trained = [p for p in module.parameters() if p.requires_grad]
    for weight in sorted(trained, key=lambda p: p.ndim < 2):  # with decay first; otherwise in their order
        key = (weight_decay if weight.ndim >= 2 else 0.0, scales.get(weight, 1.0), weight in later)
        groups.setdefault(key, []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": decay, "lr": learning_rate * scale}
            | ({"begins": begins} if late else {})
            for (decay, scale, late), weights in groups.items()
        ],
        lr=learning_rate,
        betas=betas,
        fused=fused,
    )


def warmup_cosine(
    optimiser: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a half cosine to zero; stepped once an optimiser step.

    A group that begins later has a warm-up of its own, on the same cosine.
    """

    def factor(step: int, begins: int) -> float:
        if step < begins:
            return 0.0
        rising = min(1.0, (step - begins + 1) / warmup_steps) if warmup_steps else 1.0
        if step < warmup_steps:
            return rising
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    begins = [group.get("begins", 0) for group in optimiser.param_groups]
    # Functions: of other objects a checkpoint would hold the attributes.
    factors = [lambda step, begins=one: factor(step, begins) for one in begins]
    return torch.optim.lr_scheduler.LambdaLR(optimiser, factors)
