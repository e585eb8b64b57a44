"""Building a model from plain settings, and writing those settings into its checkpoints."""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from open_clip.model import set_model_preprocess_cfg
from transformers import GPT2LMHeadModel

from clipmapper.errors import UserError
from clipmapper.models.clip_weights import architecture_config
from clipmapper.models.description import PREPROCESS, check_description
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.fine_tuning import choose_trained, merge_adapters
from clipmapper.models.mapper import MAPPERS, Mapper
from clipmapper.models.weight_files import (
    Unreadable,
    check_finite,
    check_sizes,
    check_tensors,
    read_torch_file,
)
from clipmapper.tasks.captioning.gpt2 import OwnTokenizer, gpt2_of, local_gpt2, new_gpt2, plain_config
from clipmapper.tasks.captioning.gpt2_decoder import DECODERS, GPT2Decoder, GPT2Head
from clipmapper.tasks.captioning.gpt2_model import GPT2Captioner
from clipmapper.tasks.captioning.head import CaptionHead, TiedCaptionHead
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.captioning.tokens import caption_vocabulary
from clipmapper.tasks.vqa.model import CLIPmapper, VQAHead

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


def build_clipmapper(encoder: Mapping, model: Mapping, answers: Sequence[str]) -> CLIPmapper:
    """A CLIPmapper with a pretrained encoder and a new mapper and head.

    ``encoder``: as for :func:`build_encoder`. ``model``: mapper ("dual_flow" or "single_flow"), width,
    depth, heads, mlp_ratio, image_position_embedding, head_width.
    """
    stage_1 = build_encoder(encoder)
    mapper, head = build_mapper_and_head(stage_1, model, len(answers))
    built = CLIPmapper(stage_1, mapper, head, answers)
    built.description = describe("vqa", stage_1, encoder, model, answers=list(answers))
    return built


def build_captioner(
    encoder: Mapping,
    model: Mapping,
    *,
    captions: Iterable[str] | None = None,
    tokens: Sequence[int] | None = None,
    gpt2: Mapping | None = None,
) -> Captioner:
    """A captioner with a pretrained encoder and a new mapper and head.

    ``encoder``: as for :func:`build_encoder`. ``model``: mapper, width, depth, heads, mlp_ratio,
    image_position_embedding, tied_head (score words by CLIP's own token embeddings), text_embedding_only
    (leave out CLIP's text tower), vocabulary ("tokenizer": the head knows every token; "data": only those of
    the given ``captions``, or, where these are known, ``tokens``), decoder (None: the head reads the mapper's
    words; "gpt2_prefix" or "gpt2_cross": GPT-2 reads the mapper's tokens, and its head is its own) and
    gpt2 (path of a local one, or None and the layers, width and heads of a new one; frozen). The argument
    ``gpt2`` has what a checkpoint says of the one in it.

    Raises ``UserError`` for a CLIP that cannot read a caption that is being written, and for a GPT-2 that
    cannot be read or does not fit.
    """
    stage_1 = build_encoder(encoder)
    decoder = model.get("decoder")  # older checkpoints do not say
    language_model = tokenizer = None
    if decoder is not None:
        language_model, tokenizer = _gpt2(stage_1, model, gpt2)
    if model["vocabulary"] == "tokenizer":
        tokens = None
    elif tokens is None:
        if captions is None:
            raise ValueError("vocabulary=data: give captions, or the ids of their tokens")
        tokens = caption_vocabulary(tokenizer or stage_1.tokenizer, captions)
    inner = None if tokenizer is None else language_model.config.n_embd
    mapper = _mapper(stage_1, model, captioning=True, text_width=inner)
    text_embedding_only = model["text_embedding_only"]
    if decoder is not None:
        reader = GPT2Decoder(
            language_model,
            model["width"],
            _image_length(stage_1),
            cross=decoder == "gpt2_cross",
            frozen=model["gpt2"]["frozen"],
        )
        built = GPT2Captioner(
            stage_1,
            mapper,
            reader,
            GPT2Head(language_model, tokens),
            tokenizer=tokenizer,
            text_embedding_only=text_embedding_only,
        )
        described = {
            "config": plain_config(language_model),
            "tokenizer": tokenizer and tokenizer.description(),
        }
        built.description = describe("captioning", stage_1, encoder, model, tokens=tokens, gpt2=described)
        return built
    embedding = stage_1.text_tower.owner.token_embedding
    if model["tied_head"]:
        head = TiedCaptionHead(model["width"], embedding, tokens)
    else:
        head = CaptionHead(model["width"], embedding.num_embeddings, tokens)
    built = Captioner(stage_1, mapper, head, text_embedding_only=text_embedding_only)
    built.description = describe("captioning", stage_1, encoder, model, tokens=tokens)
    return built


def _gpt2(
    encoder: ClipEncoder, model: Mapping, described: Mapping | None
) -> tuple[GPT2LMHeadModel, OwnTokenizer | None]:
    """The language model, and its tokenizer if it is not the encoder's."""
    if model["decoder"] not in DECODERS:
        raise UserError(f"model.decoder={model['decoder']}: must be null or one of {', '.join(DECODERS)}")
    settings, cross = model["gpt2"], model["decoder"] == "gpt2_cross"
    context = encoder.context_length
    if described is not None:
        tokenizer = described["tokenizer"]
        return gpt2_of(described["config"]), tokenizer and OwnTokenizer.described(tokenizer, context)
    if settings["path"] is None:
        language_model = new_gpt2(
            layers=settings["layers"],
            width=settings["width"],
            heads=settings["heads"],
            vocabulary=encoder.text_tower.owner.token_embedding.num_embeddings,
            positions=context + (0 if cross else _image_length(encoder)),
            cross=cross,
        )
        return language_model, None
    language_model, tokenizer = local_gpt2(settings["path"], cross)
    room = language_model.config.n_positions - (0 if cross else _image_length(encoder))
    if room < 3:
        raise UserError(
            f"model.gpt2.path={settings['path']}: {language_model.config.n_positions} positions have no room "
            f"for {_image_length(encoder)} image tokens and a caption; use model.decoder=gpt2_cross"
        )
    return language_model, OwnTokenizer(tokenizer, min(context, room))


def _image_length(encoder: ClipEncoder) -> int:
    """How many image tokens a mapper has; one without a class token is given one."""
    return max(1, encoder.prefix_tokens) + encoder.grid[0] * encoder.grid[1]


def build_mapper_and_head(encoder: ClipEncoder, model: Mapping, answers: int) -> tuple[Mapper, VQAHead]:
    """Stage 2 with new weights, for the settings of :func:`build_clipmapper`."""
    return _mapper(encoder, model), VQAHead(model["width"], model["head_width"], answers)


def _mapper(
    encoder: ClipEncoder, model: Mapping, captioning: bool = False, text_width: int | None = None
) -> Mapper:
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


# The model of a checkpoint, by the task in its description: (encoder's settings, description) → model.
_BUILDERS: Mapping[str, Callable[[Mapping, Mapping], CLIPmapper | Captioner]] = {
    "vqa": lambda encoder, described: build_clipmapper(encoder, described["model"], described["answers"]),
    "captioning": lambda encoder, described: build_captioner(
        encoder, described["model"], tokens=described.get("tokens"), gpt2=described.get("gpt2")
    ),
}


def load(
    path: str | Path, device: str | torch.device = "cpu", architecture: str | None = None
) -> CLIPmapper | Captioner:
    """A trained model from a checkpoint, ready to ``.answer(image, question)`` or to ``.caption(image)``.

    The file may be anybody's: no pickled code is executed, every byte is compared with its checksum, and what
    it says of the model is checked against a closed list (:mod:`clipmapper.models.description`) and against
    its own weights before anything is built. Nothing else is opened; of open_clip's own architectures some
    (SigLIP) have a tokenizer that is fetched when a text is first read. ``architecture``: for a model whose
    architecture is your own file and names a tokenizer, that file.

    Raises ``UserError`` when the file is missing, damaged, not a checkpoint of a CLIPmapper, or has weights
    that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint={path}: no such file")
    try:
        checkpoint = read_torch_file(path)
        if not isinstance(checkpoint, dict) or not {DESCRIPTION, "state_dict"} <= set(checkpoint):
            raise Unreadable("it holds no model")
        description, state = checkpoint[DESCRIPTION], checkpoint["state_dict"]
        if not isinstance(state, dict):
            raise Unreadable("it holds no model")
        state = {
            str(name).removeprefix("model."): value
            for name, value in state.items()
            if str(name).startswith("model.")
        }
        check_tensors(state, path.stat().st_size)
        check_finite(state)
        check_description(description, len(state), named=architecture is not None)
        if architecture is not None:
            _check_architecture(description["encoder"], architecture)
        # Without room for a number: a description may ask for more than there is memory.
        with torch.device("meta"):
            check_sizes(_empty(description).state_dict(), state)
        model = _empty(description)
        model.load_state_dict(state)
    except Unreadable as error:
        raise UserError(f"checkpoint={path}: not a readable checkpoint of clipmapper ({error})") from error
    except UserError as error:
        raise UserError(f"checkpoint={path}: {error}") from error
    # What a file that was tampered with raises depends on where its numbers do not go together.
    except Exception as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint={path}: not a readable checkpoint of clipmapper ({line})") from error
    merge_adapters(model.encoder)
    return model.to(device).eval()


def _check_architecture(encoder: Mapping, architecture: str) -> None:
    """Raise ``UserError`` where the user names another architecture than the checkpoint has."""
    own = architecture_config(architecture) if architecture.endswith(".json") else None
    if own != encoder["config"] or (own is None and architecture != encoder["architecture"]):
        raise UserError(f"architecture={architecture}: not the one that the model was trained with")


def _empty(description: Mapping) -> CLIPmapper | Captioner:
    """The model of a checked description, without its weights."""
    encoder = dict(description["encoder"])
    config = encoder.pop("config")
    with tempfile.TemporaryDirectory() as folder:
        if config is not None:
            # open_clip takes a configuration of one's own only from a file, and names it after the file.
            file = Path(folder) / Path(encoder["architecture"]).name
            file.write_text(json.dumps(config))
            encoder["architecture"] = str(file)
        model = _BUILDERS[description["task"]](encoder | {"pretrained": None}, description)
        if "preprocess" in encoder:
            visual = model.encoder.clip.visual
            set_model_preprocess_cfg(model.encoder.clip, visual.preprocess_cfg | encoder["preprocess"])
        if config is not None and torch.get_default_device().type != "meta":
            _ = model.encoder.tokenizer  # which is read by the file, while it is there
    model.encoder.architecture = description["encoder"]["architecture"]
    model.description = dict(description)
    return model
