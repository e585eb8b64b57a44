"""The pretraining run behind ``scripts/pretrain_clip.py``."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import lightning

from clipmapper.config import PretrainConfig
from clipmapper.errors import UserError
from clipmapper.models.clip_weights import save_clip_weights
from clipmapper.models.encoder import ClipEncoder
from clipmapper.training.checkpoint_files import restore_checkpoint, steps_of
from clipmapper.training.contrastive import ContrastiveModule, contrastive_loader, retrieval_score
from clipmapper.training.interruption import GracefulInterrupt
from clipmapper.training.less_noise import less_noise
from clipmapper.training.newest_checkpoint import NewestCheckpoint
from clipmapper.training.progress import StepsBar


def run_pretraining(config: PretrainConfig) -> dict[str, float]:
    """Train, write the weights with their card, and return the retrieval scores on held-out scenes."""
    lightning.seed_everything(config.seed, verbose=False)
    encoder = ClipEncoder(config.architecture, config.pretrained, frozen=False)
    token_ids = used_token_ids(encoder)
    module = ContrastiveModule(
        encoder,
        token_ids,
        config.caption_weight,
        config.learning_rate,
        config.weight_decay,
        config.warmup_steps,
        config.max_steps,
    )
    folder = Path("outputs/pretrain_clip")
    last = folder / "last.ckpt"
    if config.resume and not last.is_file():
        raise UserError(f"resume=true: there is no {last} to go on from")
    if config.resume:
        restore_checkpoint(last)
    first_step = steps_of(last) if config.resume else 0
    loader = contrastive_loader(
        encoder,
        batch_size=config.batch_size,
        variants=config.variants,
        seed=config.seed,
        # Weights that have seen lone objects need them no more.
        curriculum_steps=0 if config.pretrained else config.max_steps,
        first_step=first_step,
        workers=config.workers,
    )
    checkpoints = NewestCheckpoint(
        dirpath=folder,
        save_last=True,
        every_n_train_steps=config.checkpoint_every,
        enable_version_counter=False,
    )
    trainer = lightning.Trainer(
        max_steps=config.max_steps,
        accelerator="auto",
        precision=config.precision,
        logger=False,
        callbacks=[checkpoints, GracefulInterrupt(last), StepsBar(refresh_rate=10)],
        enable_model_summary=False,
    )
    began = time.monotonic()
    with less_noise():
        trainer.fit(module, loader, ckpt_path=last if config.resume else None, weights_only=True)
    minutes = (time.monotonic() - began) / 60
    easy = retrieval_score(encoder, config.seed)
    hard = retrieval_score(encoder, config.seed, variants=4)
    scores = easy | {f"hard_{name}": value for name, value in hard.items()}
    settings = {key: value for key, value in asdict(config).items() if key not in ("output", "resume")}
    card = {"config": settings, "minutes": round(minutes, 1), "retrieval": scores}
    save_clip_weights(encoder.clip, Path(config.output), token_ids, {"card": json.dumps(card)})
    return scores


def used_token_ids(encoder: ClipEncoder) -> list[int]:
    """The tokens of every word that captions and questions of the built-in world are made of."""
    import random

    from clipmapper.data.scene_captions import draw_caption
    from clipmapper.data.scene_questions import draw_presupposition
    from clipmapper.data.scenes import draw_scene

    rng = random.Random("used tokens")
    tokenizer = encoder.tokenizer
    used = {tokenizer.sot_token_id, tokenizer.eot_token_id, 0}
    for index in range(4000):
        scene = draw_scene(0, "pretrain", index)
        for text in (draw_caption(scene, rng), draw_presupposition(scene, rng)):
            used.update(tokenizer.encode(text))
    return sorted(used)
