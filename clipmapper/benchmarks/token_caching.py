"""Measure what a token cache saves in a step of training, and what half precision costs."""

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipmapper.benchmarks.captions import MODELS
from clipmapper.benchmarks.timing import machine, measured
from clipmapper.commands.explain import chosen_device
from clipmapper.commands.mistakes import seed, whole
from clipmapper.data.tokens.cache import TokenCache, TokenStore
from clipmapper.data.world.data import RenderedReader, ScenesVQA
from clipmapper.data.world.questions import ANSWERS
from clipmapper.errors import UserError
from clipmapper.models.tokens import tokenize
from clipmapper.tasks.registry import load
from clipmapper.tasks.vqa.model import CLIPmapper, build_clipmapper
from clipmapper.tasks.vqa.training import answer_loss
from clipmapper.training.record_tokens import record_question_tokens


def caching_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", choices=[*MODELS], default="scenes")
    parser.add_argument("--checkpoint", help="a trained model instead, for what half precision costs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scenes", type=whole(), default=200)
    parser.add_argument("--batch-size", type=whole(), default=64)
    parser.add_argument("--seed", type=seed, default=0)


def caching(options: Namespace) -> dict:
    """Steps/s of training the mapper from pixels, from tokens in memory and from tokens in files.

    ``half_precision``: of questions about unseen scenes, how many get the same answer from tokens in half as
    in single precision, the accuracy of both, and the largest difference of a logit.
    """
    device = chosen_device(options.device)
    model = _model(options).to(device).eval()
    data = ScenesVQA(1, 1, options.scenes, 1, 1, options.seed)
    split, reader = data.validation, data.reader(model.encoder)

    def cache(store: TokenStore) -> TokenCache:
        return record_question_tokens(model.encoder, store, split, "validation", reader)

    memory, single = cache(TokenStore()), cache(TokenStore(precision="float32"))
    rng = np.random.default_rng(options.seed)
    trained = [p for part in (model.mapper, model.head) for p in part.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=0.0)  # the time of a step, without going anywhere

    def step(tokens: TokenCache | None) -> None:
        asked = torch.from_numpy(rng.integers(0, len(split), options.batch_size))
        targets = torch.zeros(len(asked), len(model.answers), device=device)
        optimiser.zero_grad()
        answer_loss(_logits(model, split, tokens, asked, device), targets).backward()
        optimiser.step()

    with tempfile.TemporaryDirectory() as folder:
        files = cache(TokenStore(Path(folder)))
        ways = {"pixels": None, "memory": memory, "files": files}
        times = measured({n: lambda t=t: step(t) for n, t in ways.items()}, options.repeats)
    speed = {name: 1 / its["median_s"] for name, its in times.items()}
    return {
        "machine": machine(device),
        "settings": vars(options),
        "times": times,
        "steps_per_s": speed,
        "speed_up": speed["memory"] / speed["pixels"],
        "half_precision": _half_precision(model, split, memory, single, device),
    }


@torch.no_grad()
def _half_precision(model: CLIPmapper, split, half: TokenCache, single: TokenCache, device) -> dict:
    logits: dict[str, list[Tensor]] = {"half": [], "single": []}
    for asked in torch.arange(len(split)).split(256):
        for name, tokens in (("half", half), ("single", single)):
            logits[name].append(_logits(model, split, tokens, asked, device).cpu())
    found = {name: torch.cat(parts) for name, parts in logits.items()}
    given = {name: values.argmax(dim=1).tolist() for name, values in found.items()}
    true = [record.answers[0] for record in split]
    return {
        "questions": len(true),
        "same_answer": float(np.mean(np.equal(given["half"], given["single"]))),
        "accuracy": {
            name: float(np.mean([model.answers[i] == a for i, a in zip(numbers, true, strict=True)]))
            for name, numbers in given.items()
        },
        "largest_logit_difference": float((found["half"] - found["single"]).abs().max()),
        "logit_deviation": float(found["single"].std()),
    }


def _logits(model: CLIPmapper, split, tokens: TokenCache | None, asked: Tensor, device) -> Tensor:
    if tokens is not None:
        text = {name: value.to(device) for name, value in tokens.texts(asked).items()}
        images = tokens.images(asked).to(device)
    else:
        encoder, records = model.encoder, [split[int(n)] for n in asked]
        asking = tokenize(encoder.tokenizer, [record.question for record in records]).to(device)
        with torch.no_grad():
            images = encoder.image_tokens(RenderedReader(encoder.clip.visual).many(records).to(device))
            text = {"text_tokens": encoder.text_tokens(asking.ids, asking.valid), "text_valid": asking.valid}
    return model.answer_logits(images, text["text_tokens"], text["text_valid"])


def _model(options: Namespace) -> CLIPmapper:
    torch.manual_seed(options.seed)
    if options.checkpoint is not None:
        model = load(options.checkpoint)
        if model.task != CLIPmapper.task:
            raise UserError(f"--checkpoint={options.checkpoint}: not a model that answers questions")
        return model
    encoder, sizes = MODELS[options.model]
    settings = {"mapper": "dual_flow", "mlp_ratio": 4.0, "head_width": 2 * sizes["width"], **sizes}
    return build_clipmapper(encoder | {"frozen": True}, settings, ANSWERS)
