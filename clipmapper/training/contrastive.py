"""Contrastive pretraining of a small CLIP on captions of the built-in scenes.

The loss is CoCa's (Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models", eq. 4):
CLIP's own, and that of a captioner which reads the patch tokens. The contrastive loss sees the image only
through its class token, so that patches learn no more of an object than the class token asks them for; the
mapper reads the patches. The captioner is thrown away: what is left is a plain CLIP.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import lightning
import numpy as np
import torch
from jaxtyping import Float, Int
from open_clip.loss import CoCaLoss
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipmapper.data.images import clip_input
from clipmapper.data.world.captions import draw_caption
from clipmapper.data.world.questions import draw_presupposition
from clipmapper.data.world.scenes import MAX_OBJECTS, confusable_scene, draw_scene, render
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.tokens import tokenize
from clipmapper.training.module import adamw, warmup_cosine

# Most objects of a scene, and up to which share of the steps. A lone object first: with several, their
# colours alone tell most scenes of a batch apart, and shapes are hardly learnt.
_CURRICULUM = ((0.15, 1), (0.3, 2), (1.0, MAX_OBJECTS))

# CLIP's own bound on the logit scale (Radford et al. 2021, §2.5).
_MAX_LOGIT_SCALE = float(np.log(100))


class ContrastiveScenes(IterableDataset):
    """Endless batches of (image, text) pairs of fresh scenes.

    A batch holds groups of scenes that differ in one thing, so that telling them apart takes knowing every
    shape, what is bound to what, and where it is; scenes drawn independently would be told apart by any one
    of their colours. One text in eight is a question that only such a scene raises (without its
    answer), so that the words of questions are not strangers to the text tower. Scenes grow from one object
    to four over ``curriculum_steps``.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        batch_size: int,
        variants: int,
        seed: int,
        curriculum_steps: int,
        first_step: int = 0,
    ) -> None:
        self.first_step, self.curriculum_steps = first_step, curriculum_steps
        self.tokenizer = encoder.tokenizer
        self.whole_context = encoder.text_tower.padding_matters
        self.visual = encoder.clip.visual
        self.batch_size, self.variants, self.seed = batch_size, variants, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        step = self.first_step + worker
        while True:
            yield self.batch(step)
            step += workers

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"contrastive/{self.seed}/{step}")
        most = next((n for share, n in _CURRICULUM if step < share * self.curriculum_steps), MAX_OBJECTS)
        scenes, texts = [], []
        for group in range(self.batch_size // self.variants):
            scene = draw_scene(self.seed, "pretrain", step * self.batch_size + group, objects=(1, most))
            family = [scene, *(confusable_scene(scene, rng) for _ in range(self.variants - 1))]
            scenes += family
            for member in family:
                draw_text = draw_presupposition if rng.random() < 1 / 8 else draw_caption
                texts.append(draw_text(member, rng))
        images = clip_input(render(scenes).images, self.visual)
        return images, tokenize(self.tokenizer, texts, whole_context=self.whole_context).ids


class CaptionDecoder(nn.Module):
    """A causal decoder over the text tower's tokens that reads the image's, and says the next token.

    ``token_ids``: the tokens it may say (a caption holds no other), sorted, among them padding, 0.
    """

    def __init__(self, encoder: ClipEncoder, token_ids: list[int], heads: int = 4) -> None:
        super().__init__()
        width = encoder.text_width
        self.read = nn.Linear(encoder.image_width, width)
        self.layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.say = nn.Linear(width, len(token_ids))
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)

    def forward(
        self, text_tokens: Float[Tensor, "n text width"], image_tokens: Float[Tensor, "n image channels"]
    ) -> Float[Tensor, "n text said"]:
        length = text_tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=text_tokens.device).triu(1)
        return self.say(self.norm(self.layer(text_tokens, self.read(image_tokens), tgt_mask=later)))

    def labels(self, ids: Int[Tensor, "n text"]) -> Int[Tensor, "n text"]:
        """Positions of the tokens among ``token_ids``; 0, the position of padding, for padding."""
        return torch.searchsorted(self.token_ids, ids.contiguous())


class ContrastiveModule(lightning.LightningModule):
    """CoCa's loss by ``open_clip``'s own ``CoCaLoss``; ``caption_weight`` 0 leaves CLIP's.

    ``settings``: of the run, kept in its checkpoints.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        token_ids: list[int],
        caption_weight: float,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        max_steps: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.captioner = CaptionDecoder(encoder, token_ids)
        self.loss = CoCaLoss(caption_loss_weight=caption_weight, clip_loss_weight=1.0, pad_id=0)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.max_steps = warmup_steps, max_steps
        self.settings: dict = {}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["settings"] = self.settings

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        images, ids = batch
        encoder = self.encoder
        # The fused backward of CPUs is slow in bfloat16: half of a step, where this one takes a tenth.
        with sdpa_kernel(SDPBackend.MATH) if images.device.type == "cpu" else nullcontext():
            image_tokens = encoder.image_tokens(images)
            text_tokens = encoder.text_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
            said = self.captioner(text_tokens[:, :-1], image_tokens)
        image = normalize(encoder.pool_image(image_tokens).float(), dim=-1)
        text = normalize(encoder.pool_text(text_tokens, ids).float(), dim=-1)
        labels = self.captioner.labels(ids[:, 1:])
        scale = encoder.clip.logit_scale.exp()
        contrastive, caption = self.loss(image, text, said.float(), labels, scale)
        self.log_dict({"contrastive": contrastive, "caption": caption}, prog_bar=True)
        return contrastive + caption

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Not by the trainer: with mixed precision it refuses to clip for a fused optimiser, even where
        # no gradient is scaled.
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def on_train_batch_end(self, *_) -> None:
        with torch.no_grad():
            self.encoder.clip.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)

    def configure_optimizers(self) -> dict:
        optimiser = adamw(self, self.learning_rate, self.weight_decay, fused=True)
        schedule = warmup_cosine(optimiser, self.warmup_steps, self.max_steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def contrastive_loader(
    encoder: ClipEncoder,
    *,
    batch_size: int,
    variants: int,
    seed: int,
    curriculum_steps: int,
    first_step: int,
    workers: int,
) -> DataLoader:
    """Batches from ``first_step`` on (0, or where a run that is resumed had stopped)."""
    dataset = ContrastiveScenes(encoder, batch_size, variants, seed, curriculum_steps, first_step)
    # Forked, as those of other runs: they leave signals to the main process (stopping.py).
    loading = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    return DataLoader(dataset, batch_size=None, num_workers=workers, **loading)


@torch.no_grad()
def retrieval_score(
    encoder: ClipEncoder, seed: int, scenes: int = 1000, variants: int = 1
) -> dict[str, float]:
    """Share of held-out scenes whose own caption is the nearest of all (and the reverse), in a pool."""
    encoder.eval()
    rng = random.Random(f"retrieval/{seed}")
    drawn = []
    for group in range(scenes // variants):
        scene = draw_scene(seed, "retrieval", group)
        drawn += [scene, *(confusable_scene(scene, rng) for _ in range(variants - 1))]
    images = clip_input(render(drawn).images, encoder.clip.visual)
    captions = [draw_caption(s, rng) for s in drawn]
    ids = tokenize(encoder.tokenizer, captions, whole_context=encoder.text_tower.padding_matters).ids
    image, text = encoder.embeddings(images, ids)
    similarity = image @ text.T
    truth = torch.arange(len(drawn))
    return {
        "image_to_text_top1": float((similarity.argmax(1) == truth).float().mean()),
        "text_to_image_top1": float((similarity.argmax(0) == truth).float().mean()),
        "image_to_text_top5": float((similarity.topk(5, 1).indices == truth[:, None]).any(1).float().mean()),
    }
