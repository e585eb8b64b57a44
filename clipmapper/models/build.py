"""Building a model from plain settings, and writing those settings into its checkpoints."""

import json
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from clipmapper.errors import UserError
from clipmapper.models.caption_head import CaptionHead, TiedCaptionHead
from clipmapper.models.caption_tokens import caption_vocabulary
from clipmapper.models.captioner import Captioner
from clipmapper.models.clip_weights import prepare_images_as
from clipmapper.models.clipmapper import CLIPmapper
from clipmapper.models.encoder import ClipEncoder
from clipmapper.models.fine_tuning import choose_trained, merge_adapters
from clipmapper.models.gpt2 import OwnTokenizer, gpt2_of, local_gpt2, new_gpt2, plain_config
from clipmapper.models.gpt2_captioner import GPT2Captioner
from clipmapper.models.gpt2_decoder import DECODERS, GPT2Decoder, GPT2Head
from clipmapper.models.heads import VQAHead
from clipmapper.models.mapper import MAPPERS, Mapper
from clipmapper.shipped import shipped_path

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
    built.description = describe("vqa", encoder, model, answers=list(answers))
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
        built.description = describe("captioning", encoder, model, tokens=tokens, gpt2=described)
        return built
    embedding = stage_1.text_tower.owner.token_embedding
    if model["tied_head"]:
        head = TiedCaptionHead(model["width"], embedding, tokens)
    else:
        head = CaptionHead(model["width"], embedding.num_embeddings, tokens)
    built = Captioner(stage_1, mapper, head, text_embedding_only=text_embedding_only)
    built.description = describe("captioning", encoder, model, tokens=tokens)
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


def describe(task: str, encoder: Mapping, model: Mapping, **more) -> dict:
    """Everything but the weights, in plain types; an architecture of one's own goes in whole.

    ``more``: what the task's model needs besides (the answers, the tokens of the head).
    """
    architecture = encoder["architecture"]
    config = None
    if architecture.endswith(".json"):
        config = json.loads(shipped_path(architecture).read_text())
    return {
        "task": task,
        "encoder": {"architecture": architecture, "frozen": encoder["frozen"], "config": config}
        | {key: encoder[key] for key in _CHOSEN if encoder.get(key) is not None},
        "tokenizer": Path(architecture).stem if config else architecture,
        "model": dict(model),
        **more,
    }


# The model of a checkpoint, by the task in its description: (encoder's settings, description) → model.
_BUILDERS: Mapping[str, Callable[[Mapping, Mapping], CLIPmapper | Captioner]] = {
    "vqa": lambda encoder, described: build_clipmapper(encoder, described["model"], described["answers"]),
    "captioning": lambda encoder, described: build_captioner(
        encoder, described["model"], tokens=described["tokens"], gpt2=described.get("gpt2")
    ),
}


def load(path: str | Path, device: str | torch.device = "cpu") -> CLIPmapper | Captioner:
    """A trained model from a checkpoint, ready to ``.answer(image, question)`` or to ``.caption(image)``.

    No pickled code is executed and nothing but the file is needed. Raises ``UserError`` when the file is
    missing, damaged, or not a checkpoint of a CLIPmapper.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint={path}: no such file")
    try:
        with warnings.catch_warnings():
            # What torch says about pickles of other programs helps nobody: the line below says enough.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        description = checkpoint[DESCRIPTION]
        state = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
        model = _empty(description)
        model.load_state_dict(state)
    except (pickle.UnpicklingError, LookupError) as error:
        # torch's own text advises to execute what is in the file; what is missing in it tells a user nothing.
        what = "it is damaged, of another program, or holds more than weights"
        raise UserError(f"checkpoint={path}: not a readable checkpoint of clipmapper ({what})") from error
    except (RuntimeError, TypeError, ValueError, AttributeError, EOFError, OSError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint={path}: not a readable checkpoint of clipmapper ({line})") from error
    merge_adapters(model.encoder)
    return model.to(device).eval()


def _empty(description: Mapping) -> CLIPmapper | Captioner:
    encoder = dict(description["encoder"])
    config = encoder.pop("config")
    with tempfile.TemporaryDirectory() as folder:
        if config is not None:
            # open_clip takes a configuration of one's own only from a file, and names it after the file.
            file = Path(folder) / Path(encoder["architecture"]).name
            file.write_text(json.dumps(config))
            encoder["architecture"] = str(file)
        model = _BUILDERS[description["task"]](encoder | {"pretrained": None}, description)
        if encoder.get("pretrained") is not None:
            prepare_images_as(model.encoder.clip, encoder["architecture"], encoder["pretrained"])
        if config is not None:
            _ = model.encoder.tokenizer  # which is read by the file, while it is there
    model.encoder.architecture = description["encoder"]["architecture"]
    model.description = dict(description)
    return model
