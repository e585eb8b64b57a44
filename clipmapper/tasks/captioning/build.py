"""Building a captioner from plain settings."""

from collections.abc import Iterable, Mapping, Sequence

from transformers import GPT2LMHeadModel

from clipmapper.errors import UserError
from clipmapper.models.checkpoint import build_encoder, build_mapper, describe
from clipmapper.models.description import HEADS, ID, LAYERS, MAPPER, WIDTH, ModelRules
from clipmapper.models.encoder import ClipEncoder
from clipmapper.settings.plain_values import absent_or, flag, list_of, one_of, section, text
from clipmapper.tasks.captioning.gpt2 import (
    GPT2_SECTION,
    OwnTokenizer,
    gpt2_of,
    local_gpt2,
    new_gpt2,
    plain_config,
)
from clipmapper.tasks.captioning.gpt2_decoder import DECODERS, GPT2Captioner, GPT2Decoder
from clipmapper.tasks.captioning.head import CaptionHead, GPT2Head, TiedCaptionHead, caption_vocabulary
from clipmapper.tasks.captioning.model import Captioner


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
    mapper = build_mapper(stage_1, model, captioning=True, text_width=inner)
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


class DescribedCaptioner:
    """The part of the task that loading a checkpoint needs
    (:class:`clipmapper.models.checkpoint.Buildable`)."""

    def rules(self) -> ModelRules:
        settings = section(
            {
                "path": absent_or(text(10_000)),
                "layers": LAYERS,
                "width": WIDTH,
                "heads": HEADS,
                "frozen": flag,
            }
        )
        model = section(
            MAPPER
            | {"tied_head": flag, "text_embedding_only": flag, "vocabulary": one_of("tokenizer", "data")},
            {"decoder": one_of(None, *DECODERS), "gpt2": settings},  # older checkpoints do not say
        )
        more = {"tokens": absent_or(list_of(ID, 1)), "gpt2": GPT2_SECTION}
        return ModelRules(model, {}, more, _check, _layers)

    def build(self, encoder: Mapping, description: Mapping) -> Captioner:
        tokens, gpt2 = description.get("tokens"), description.get("gpt2")
        return build_captioner(encoder, description["model"], tokens=tokens, gpt2=gpt2)


def _check(description: Mapping) -> None:
    model = description["model"]
    if model.get("decoder") is not None and ("gpt2" not in description or "gpt2" not in model):
        raise ValueError(f"its description: has no gpt2, the decoder {model['decoder']} of model.decoder")
    if model["vocabulary"] == "data" and description.get("tokens") is None:
        raise ValueError("its description: has no tokens, the vocabulary of its data")


def _layers(description: Mapping) -> int:
    return description.get("gpt2", {}).get("config", {}).get("n_layer", 0)
