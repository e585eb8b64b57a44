"""Building stage 1 and stage 2 from plain settings, and the settings as a checkpoint says them."""

from collections.abc import Mapping
from pathlib import Path

from clipmapper.models.clip_weights import architecture_config
from clipmapper.models.description import PREPROCESS
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.fine_tuning import choose_trained
from clipmapper.models.mapper import MAPPERS, Mapper

# What a description says of the encoder only where it is chosen.
_CHOSEN = ("image_size", "trained_blocks", "lora_rank")
# Under this key a checkpoint holds what it takes to rebuild the model.
DESCRIPTION = "clipmapper"


def build_encoder(encoder: Mapping) -> ClipEncoder:
    """Stage 1.

    ``encoder``: architecture, pretrained, frozen; where they are not None, image_size, and of one that is not
    frozen trained_blocks and lora_rank (:func:`clipmapper.models.fine_tuning.choose_trained`).
    """
    built = ClipEncoder(
        encoder["architecture"], encoder["pretrained"], encoder["frozen"], encoder.get("image_size")
    )
    if not encoder["frozen"]:
        choose_trained(built, encoder.get("trained_blocks"), encoder.get("lora_rank"))
    return built


def build_mapper(
    encoder: ClipEncoder, model: Mapping, captioning: bool = False, text_width: int | None = None
) -> Mapper:
    """Stage 2 with new weights. ``model``: mapper ("dual_flow" or "single_flow"), width, depth, heads,
    mlp_ratio, image_position_embedding. ``text_width``: of the words that it is given, None: the encoder's."""
    return MAPPERS[model["mapper"]](
        encoder.image_width,
        encoder.text_width if text_width is None else text_width,
        encoder.grid,
        width=model["width"],
        depth=model["depth"],
        heads=model["heads"],
        mlp_ratio=model["mlp_ratio"],
        class_token=encoder.prefix_tokens == 0,
        image_position_embedding=model["image_position_embedding"],
        captioning=captioning,
    )


def describe(task: str, stage_1: ClipEncoder, encoder: Mapping, model: Mapping, **more) -> dict:
    """Everything but the weights, in plain types; an architecture of one's own goes in whole.

    ``more``: what the task's model needs besides (the answers, the tokens of the head).
    """
    architecture = encoder["architecture"]
    config = architecture_config(architecture) if architecture.endswith(".json") else None
    preprocess = {key: stage_1.clip.visual.preprocess_cfg[key] for key in PREPROCESS}
    return {
        "task": task,
        "encoder": {"architecture": architecture, "frozen": encoder["frozen"], "config": config}
        | {key: encoder[key] for key in _CHOSEN if encoder.get(key) is not None}
        | {"preprocess": {k: list(v) if isinstance(v, tuple) else v for k, v in preprocess.items()}},
        "tokenizer": Path(architecture).stem if config else architecture,
        "model": dict(model),
        **more,
    }
