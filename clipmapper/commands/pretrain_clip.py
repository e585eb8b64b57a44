"""The pretraining run behind ``scripts/pretrain_clip.py``."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import lightning
import torch

from clipmapper.errors import RunCutShort, RunInterrupted, UserError
from clipmapper.host.outputs import NO_ROOM, check_file, check_folder
from clipmapper.host.stopping import forks_ignore_signals
from clipmapper.models.clip_weights import save_clip_weights
from clipmapper.models.encoder import ClipEncoder
from clipmapper.settings.commands import PretrainConfig
from clipmapper.training.checkpoint import (
    DurableCheckpointIO,
    check_resumable,
    check_same_model,
    restore_checkpoint,
)
from clipmapper.training.contrastive import ContrastiveModule, contrastive_loader, retrieval_score
from clipmapper.training.endings import killed_worker
from clipmapper.training.interruption import GracefulInterrupt, SaveSteps
from clipmapper.training.launching import less_noise
from clipmapper.training.run_folder import only_one
from clipmapper.training.trainer import steps_progress

# Of whatever run, so that resume=true finds the one that was stopped; beside the default of `output`.
_SCENES_FOR_WORDS = 4000  # every word is in a dozen of them or more
_LAST = Path("outputs/pretrain_clip/last.ckpt")

# Settings that say where and how the run is made, not what comes out: it may go on with others.
_FREE = ("output", "resume")
_HOW = ("workers", "checkpoint_every")


def run_pretraining(config: PretrainConfig) -> dict[str, float]:
    """Train, write the weights with their card, and return the retrieval scores on held-out scenes.

    Raises ``UserError`` for settings and files that cannot be, before anything long begins, and where the run
    cannot go on; :class:`~clipmapper.errors.RunInterrupted` when the user stops it.
    """
    check_file(Path(config.output), f"output={config.output}")
    check_folder(_LAST.parent, f"{_LAST.parent} (where the run saves)")
    _LAST.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in asdict(config).items() if key not in _FREE}
    try:
        with forks_ignore_signals(), only_one(_LAST.parent):
            return _run_pretraining(config)
    except (RunInterrupted, KeyboardInterrupt) as stop:
        raise RunInterrupted(f"{str(stop) or 'stopped at once'}; {_way_on(settings)}") from stop
    except SystemExit as leaving:  # as Lightning turns Ctrl-C into
        if not isinstance(leaving.__context__, KeyboardInterrupt):
            raise
        raise RunInterrupted(f"stopped at once; {_way_on(settings)}") from leaving
    except RunCutShort as error:
        raise UserError(f"{error}. {_way_on(settings)}") from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = error.filename or config.output
        raise UserError(f"no room to write ({error.strerror}): {where}. {_way_on(settings)}") from error
    except RuntimeError as error:
        if (line := killed_worker(error)) is None:
            raise
        raise UserError(f"{line}. {_way_on(settings)}") from error


def _run_pretraining(config: PretrainConfig) -> dict[str, float]:
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
    module.settings = {key: value for key, value in asdict(config).items() if key not in _FREE}
    first_step = _checked(_LAST, module.settings)["global_step"] if config.resume else 0
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
    saving = SaveSteps(_LAST, config.checkpoint_every)
    trainer = lightning.Trainer(
        max_steps=config.max_steps,
        accelerator="auto",
        precision=config.precision,
        logger=False,
        callbacks=[saving, GracefulInterrupt(saving), steps_progress(10)],
        plugins=[DurableCheckpointIO()],
        enable_checkpointing=False,  # interruption.py
        enable_model_summary=False,
    )
    if config.resume:
        check_same_model(_LAST, module)
        check_resumable(_LAST, trainer, module)
    began = time.monotonic()
    with less_noise():
        trainer.fit(module, loader, ckpt_path=_LAST if config.resume else None, weights_only=True)
    minutes = (time.monotonic() - began) / 60
    easy = retrieval_score(encoder, config.seed)
    hard = retrieval_score(encoder, config.seed, variants=4)
    scores = easy | {f"hard_{name}": value for name, value in hard.items()}
    card = {"config": module.settings, "minutes": round(minutes, 1), "retrieval": scores}
    save_clip_weights(encoder.clip, Path(config.output), token_ids, {"card": json.dumps(card)})
    return scores


def _checked(path: Path, settings: Mapping) -> Mapping:
    """The checkpoint to go on from. Raises ``UserError`` where there is none of these settings."""
    if not path.is_file():
        raise UserError(f"resume=true: there is no {path} to go on from")
    if (line := restore_checkpoint(path)) is not None:
        print(line)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    before = checkpoint.get("settings", settings)  # older ones don't say
    changed = [key for key in settings if key not in _HOW and before.get(key) != settings[key]]
    if changed:
        raise UserError(
            f"resume=true: {changed[0]} is not what {path} was started with ({before.get(changed[0])}); "
            "resume with the same settings, or start anew without it"
        )
    return checkpoint


def _way_on(settings: Mapping) -> str:
    """How to go on with the run, as the disk has it at this moment."""
    try:
        step = _checked(_LAST, settings)["global_step"]
    except UserError:
        return "nothing was saved: there is nothing to resume"
    return f"{step} steps are saved: the same command with resume=true goes on"


def used_token_ids(encoder: ClipEncoder) -> list[int]:
    """The tokens of every word that captions and questions of the built-in world are made of."""
    import random

    from clipmapper.data.world.captions import draw_caption
    from clipmapper.data.world.questions import draw_presupposition
    from clipmapper.data.world.scenes import draw_scene

    rng = random.Random("used tokens")
    tokenizer = encoder.tokenizer
    used = {tokenizer.sot_token_id, tokenizer.eot_token_id, 0}
    for index in range(_SCENES_FOR_WORDS):
        scene = draw_scene(0, "pretrain", index)
        for text in (draw_caption(scene, rng), draw_presupposition(scene, rng)):
            used.update(tokenizer.encode(text))
    return sorted(used)
