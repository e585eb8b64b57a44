"""Speed of writing captions, and of explaining every word of one."""

from argparse import ArgumentParser, Namespace

import torch
from torch import Tensor

from clipmapper.benchmarks.timing import measured
from clipmapper.commands.explain import chosen_device
from clipmapper.commands.mistakes import seed, whole
from clipmapper.data.images import clip_input
from clipmapper.data.world.captions import aligned_captions
from clipmapper.data.world.data import ScenesCaptions
from clipmapper.data.world.scenes import draw_scene, render
from clipmapper.host.machine import machine
from clipmapper.relevance import method_named
from clipmapper.tasks.captioning.build import build_captioner
from clipmapper.tasks.captioning.decoding import Decoding, write_captions
from clipmapper.tasks.captioning.explain import explain_captions
from clipmapper.tasks.captioning.model import Captioner
from clipmapper.tasks.registry import load

# Built-in scenes on the shipped CLIP, and the paper's sizes. Weights do not matter for the time.
MODELS = {
    "scenes": (
        {"architecture": "checkpoints/scenes-clip.json", "pretrained": "checkpoints/scenes-clip.safetensors"},
        {"width": 128, "depth": 2, "heads": 4, "image_position_embedding": True, "vocabulary": "data"},
    ),
    "vit_b_32": (
        {"architecture": "ViT-B-32-quickgelu", "pretrained": None},
        {"width": 512, "depth": 3, "heads": 8, "image_position_embedding": False, "vocabulary": "tokenizer"},
    ),
}
_COMMON = {"mapper": "dual_flow", "mlp_ratio": 4.0, "tied_head": False, "text_embedding_only": False}


def decoding_arguments(parser: ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--images", type=whole(), default=16)
    parser.add_argument("--tokens", type=whole(), default=20, help="length of every caption")
    parser.add_argument("--beams", type=whole(), default=1)


def decoding(options: Namespace) -> dict:
    """Tokens/s with and without the cache. Every caption has the same length, so ends do not count."""
    model, images = _model_and_images(options, options.images)
    # No caption ends before its last token: both ways write the same number of tokens.
    length = {"min_length": options.tokens - 1, "max_length": options.tokens}
    how = (
        Decoding("beam", beams=options.beams, **length) if options.beams > 1 else Decoding("greedy", **length)
    )
    with torch.no_grad():
        image_tokens = model.encoder.image_tokens(images)
    times = measured(
        {
            "cached": lambda: write_captions(model, image_tokens, how),
            "uncached": lambda: write_captions(model, image_tokens, how, use_cache=False),
        },
        options.repeats,
    )
    tokens = options.images * options.tokens
    speed = {name: tokens / its["median_s"] for name, its in times.items()}
    return {
        "machine": machine(model.device),
        "settings": vars(options),
        "times": times,
        "tokens_per_s": speed,
        "speed_up": speed["cached"] / speed["uncached"],
    }


def explanation_arguments(parser: ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--method", default="weighted")


def explanation(options: Namespace) -> dict:
    """One word-by-word explanation of a caption of T words against T explanations of a word each.

    And against the floor of the latter: a plain forward and backward a token, without recorder and method.
    """
    method_named(options.method)
    model, images = _model_and_images(options, 1)
    caption = max((c.text for c in aligned_captions(_scene(options.seed))), key=len)
    text = model.tokenize(caption)

    def explain(**more):
        return explain_captions(model, images, methods=[options.method], caption=caption, **more)[0]

    words = len(explain().words)

    def separately() -> None:
        for place in range(words):
            explain(word=place)

    times = measured(
        {"together": explain, "separately": separately, "plain": lambda: _plain(model, images, text)},
        options.repeats,
    )
    return {
        "machine": machine(model.device),
        "settings": vars(options),
        "words": words,
        "tokens": int(text.removable.sum()),
        "times": times,
        "ratio": times["together"]["median_s"] / times["separately"]["median_s"],
        "ratio_to_plain": times["together"]["median_s"] / times["plain"]["median_s"],
    }


def _plain(model: Captioner, images: Tensor, text) -> None:
    """The gradient of every token's logit at the pixels."""
    for position in text.removable[0].nonzero().flatten().tolist():
        pixels = images.clone().requires_grad_()
        logits = model(pixels, text)
        torch.autograd.grad(logits[0, position - 1, text.ids[0, position]], pixels)


def _model_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", choices=[*MODELS], default="scenes")
    parser.add_argument("--checkpoint", help="a trained captioner instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=seed, default=0)


def _model_and_images(options: Namespace, count: int) -> tuple[Captioner, Tensor]:
    device = chosen_device(options.device)
    torch.manual_seed(options.seed)
    if options.checkpoint is not None:
        model = load(options.checkpoint, device)
    else:
        encoder, settings = MODELS[options.model]
        captions = ScenesCaptions.wordings()
        model = build_captioner(encoder | {"frozen": True}, _COMMON | settings, captions=captions)
    scenes = [_scene(options.seed + i) for i in range(count)]
    return model.to(device).eval().requires_grad_(False), clip_input(
        render(scenes).images, model.encoder.clip.visual
    ).to(device)


def _scene(seed: int):
    return draw_scene(seed, "benchmark", 0, objects=(3, 3))
