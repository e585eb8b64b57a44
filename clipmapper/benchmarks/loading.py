"""Speed of what comes before a step of training: reading photographs, and what a token cache saves."""

import io
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from clipmapper.benchmarks.captions import MODELS
from clipmapper.benchmarks.timing import measured
from clipmapper.commands.explain import chosen_device
from clipmapper.commands.mistakes import seed, some_path, whole
from clipmapper.data.images import image_problem
from clipmapper.data.pixels import DECODING, PixelReader
from clipmapper.data.records import Record, RecordDataset
from clipmapper.data.token_cache import TokenCache, TokenStore
from clipmapper.data.world.data import RenderedReader, ScenesVQA
from clipmapper.data.world.questions import ANSWERS
from clipmapper.errors import UserError
from clipmapper.host.machine import machine
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


def loading_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", type=some_path, help="a folder of JPEGs; without it, some are drawn")
    parser.add_argument("--count", type=whole(), default=64)
    parser.add_argument("--size", type=whole(), default=224, help="of what the encoder reads")
    parser.add_argument("--workers", type=whole(0), nargs="*", default=[0, 2])
    parser.add_argument("--seed", type=seed, default=0)


def loading(options: Namespace) -> dict:
    """Images/s of open_clip's transform and of the loaders' reader, each on one core; loaders with workers.

    "fast" and "exact" are :class:`PixelReader`, what every loader of records calls. ``deviation``: of their
    pixels from open_clip's own, in levels of 255, mean and largest. ``bytes``: of an image on its way to the
    device.
    """
    records = [Record(number, file, str(number)) for number, file in enumerate(_files(options))]
    settings = PreprocessCfg(size=options.size)
    transform = image_transform_v2(settings, is_train=False)
    readers = {decoding: PixelReader(vars(settings), decoding) for decoding in DECODING}
    ways: dict[str, Callable[[Record], Tensor]] = {
        "open_clip": lambda record: transform(record.pil()),
        **readers,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = measured({name: _over(way, records) for name, way in ways.items()}, options.repeats)
        std, mean = (torch.tensor(v)[:, None, None] for v in (settings.std, settings.mean))
        levels = [(ways["open_clip"](record) * std + mean) * 255 for record in records]
        deviation = {}
        for name, reader in readers.items():
            pairs = zip(map(reader, records), levels, strict=True)
            off = torch.stack([(pixels.float() - wanted).abs() for pixels, wanted in pairs])
            deviation[name] = {"mean": round(float(off.mean()), 4), "max": round(float(off.max()), 2)}
    finally:
        torch.set_num_threads(threads)
    # (Of this process's one thread: on a machine that others use too, its own seconds are what compares.)
    speed = {name: len(records) / its["cpu_median_s"] for name, its in times.items()}
    loaders = measured(
        {str(workers): _loader(records, readers["fast"], workers) for workers in options.workers},
        options.repeats,
    )
    return {
        "machine": machine(torch.device("cpu")),
        "settings": {**vars(options), "images": options.images and str(options.images)},
        "megapixels": float(np.mean([np.prod(Image.open(io.BytesIO(r.image)).size) for r in records])) / 1e6,
        "times": times,
        "images_per_s_and_core": speed,
        "bytes": {name: way(records[0]).nbytes for name, way in ways.items()},
        "deviation": deviation,
        "speed_up": speed["fast"] / speed["open_clip"],
        "loader_images_per_s": {name: len(records) / its["median_s"] for name, its in loaders.items()},
    }


def _over(way: Callable[[Record], Tensor], records: Sequence[Record]) -> Callable[[], None]:
    def work() -> None:
        for record in records:
            way(record)

    return work


def _loader(records: Sequence[Record], reader: PixelReader, workers: int) -> Callable[[], None]:
    """A pass over the data set as training makes one; starting the workers is not counted."""
    loader = DataLoader(
        RecordDataset(records, reader),
        batch_size=16,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_pixels,
    )

    def work() -> None:
        for _ in loader:
            pass

    return work


def _pixels(items: list) -> Tensor:
    return torch.stack([pixels for _, pixels in items])


def _files(options: Namespace) -> list[bytes]:
    if options.images is None:
        return [_drawn(options.seed + number) for number in range(options.count)]
    found = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise UserError(f"--images={options.images}: no JPEG there")
    found = found[: options.count]
    for file in found:
        if problem := image_problem(file):
            raise UserError(f"--images: {file}: {': '.join(problem)}")
    return [found[number % len(found)].read_bytes() for number in range(options.count)]


def _drawn(seed: int) -> bytes:
    """A JPEG of the size and about the weight of COCO's: smooth colours with some grain."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.float32)
    grained = smooth + rng.normal(0, 8, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
