"""Contrastive pretraining of a small CLIP on captions of the built-in scenes."""

import random
from collections.abc import Iterator

import lightning
import numpy as np
import torch
from jaxtyping import Float
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipmapper.data.scene_captions import draw_caption
from clipmapper.data.scene_questions import draw_presupposition
from clipmapper.data.scenes import MAX_OBJECTS, confusable_scene, draw_scene, render
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.tokens import tokenize
from clipmapper.training.optimisation import adamw, warmup_cosine

# Most objects of a scene, and up to which share of the steps. A lone object first: with several, their
# colours alone tell most scenes of a batch apart, and shapes are hardly learnt.
_CURRICULUM = ((0.35, 1), (0.55, 2), (1.0, MAX_OBJECTS))

# CLIP's own bound on the logit scale (Radford et al. 2021, §2.5).
_MAX_LOGIT_SCALE = float(np.log(100))


def normalise_images(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [n, height, width, 3] → Float[n, 3, height, width], as the CLIP's own transform ends."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


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
        self.mean, self.std = encoder.clip.visual.image_mean, encoder.clip.visual.image_std
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
        images = normalise_images(render(scenes).images, self.mean, self.std)
        return images, tokenize(self.tokenizer, texts, whole_context=self.whole_context).ids


class ContrastiveModule(lightning.LightningModule):
    """CLIP's symmetric cross-entropy (Radford et al. 2021), by ``open_clip``'s own loss."""

    def __init__(
        self,
        encoder: ClipEncoder,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        max_steps: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = ClipLoss()
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_steps, self.max_steps = warmup_steps, max_steps

    def features(self, images: Tensor, ids: Tensor) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        encoder = self.encoder
        image = encoder.pool_image(encoder.image_tokens(images))
        everything = torch.ones_like(ids, dtype=torch.bool)
        text = encoder.pool_text(encoder.text_tokens(ids, everything), ids)
        return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        scale = self.encoder.clip.logit_scale
        loss = self.loss(*self.features(*batch), scale.exp())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_) -> None:
        with torch.no_grad():
            self.encoder.clip.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)

    def configure_optimizers(self) -> dict:
        optimiser = adamw(self.encoder.clip, self.learning_rate, self.weight_decay)
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
    return DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)


@torch.no_grad()
def retrieval_score(
    encoder: ClipEncoder, seed: int, scenes: int = 1000, variants: int = 1
) -> dict[str, float]:
    """Share of held-out scenes whose own caption is the nearest of all (and the reverse), in a pool."""
    encoder.eval()
    visual = encoder.clip.visual
    rng = random.Random(f"retrieval/{seed}")
    drawn = []
    for group in range(scenes // variants):
        scene = draw_scene(seed, "retrieval", group)
        drawn += [scene, *(confusable_scene(scene, rng) for _ in range(variants - 1))]
    images = normalise_images(render(drawn).images, visual.image_mean, visual.image_std)
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
