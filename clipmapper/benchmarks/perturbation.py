"""Measure the time of a perturbation test against its plain forwards and against the loop that masks."""

from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from clipmapper.benchmarks.subjects import scenes_mapper, tokens_of_texts, vit_b_32_mapper
from clipmapper.benchmarks.timing import measured, ratio_chart
from clipmapper.commands.explain import chosen_device
from clipmapper.commands.mistakes import seconds, whole
from clipmapper.data.images import input_size
from clipmapper.evaluation.perturbation import (
    FRACTIONS,
    ModalityRelevance,
    number_removed,
    perturb,
    removal_order,
)
from clipmapper.host.machine import machine
from clipmapper.models.tokens import TokenizedText
from clipmapper.tasks.vqa.model import CLIPmapper
from clipmapper.tasks.vqa.perturbation import AnswerScorer
from clipmapper.training.shown import console

MODELS: dict[str, Callable[[], CLIPmapper]] = {"scenes": scenes_mapper, "vit_b_32": vit_b_32_mapper}
PROTOCOL, NAIVE = "protocol", "naive loop"


def perturbation_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", choices=[*MODELS], default="scenes")
    parser.add_argument(
        "--samples", type=whole(), default=16, help="in one chunk; the naive loop's batch as well"
    )
    parser.add_argument(
        "--methods", type=whole(), default=4, help="how many (random) orders of removal there are"
    )
    parser.add_argument("--batch-size", type=whole(), default=128, help="most variants in one forward")
    parser.add_argument(
        "--patience", type=seconds, default=300.0, help="seconds after which a way is repeated no more"
    )
    parser.add_argument("--device", default="auto")


def perturbation(options: Namespace) -> dict:
    """Time of the whole perturbation test of some samples, divided by that of the forwards it needs.

    ``ratio_to_forwards``: to the sum, over all different variants, of a plain forward of CLIPmapper at that
    many tokens in the largest batch; ``ratio_to_changed_parts``: the same, of what a variant changes alone
    (the other tower left out). ``times_faster_than_naive``: than a loop that makes, for each method,
    direction and fraction, a full masked forward of the same samples.
    """
    device = chosen_device(options.device)
    run = _Run(MODELS[options.model]().to(device), options)
    counts = run.variants()
    ways = {
        PROTOCOL: run.protocol,
        NAIVE: run.naive,
        "image tower": run.image_tower,
        "text tower": run.text_tower,
    }
    ways |= {f"{modality}, {count} tokens": run.plain(modality, count) for modality, count in counts}
    with tqdm(total=(options.repeats + 1) * len(ways), desc="perturbation") as bar:

        def progress(way: str) -> None:
            bar.set_postfix_str(way)
            bar.update()

        times = measured(ways, options.repeats, patience_s=options.patience, progress=progress)
    results = {"machine": machine(device), "settings": vars(options), "times": times}
    results["variants"] = [{"modality": m, "kept": k, "number": n} for (m, k), n in counts.items()]
    for key, clock in (("", "median_s"), ("cpu_", "cpu_median_s")):
        other = {"image": times["text tower"][clock], "text": times["image tower"][clock]}
        changed = whole = 0.0
        for (modality, count), number in counts.items():
            part = times[f"{modality}, {count} tokens"][clock]
            changed += number * part / options.batch_size
            whole += number * (part + other[modality]) / options.batch_size
        protocol = times[PROTOCOL][clock]
        results[f"{key}ratio_to_forwards"] = protocol / whole
        results[f"{key}ratio_to_changed_parts"] = protocol / changed
        results[f"{key}times_faster_than_naive"] = times[NAIVE][clock] / protocol
    return results


class _Run:
    """Samples, orders of removal, and the ways to score them."""

    def __init__(self, model: CLIPmapper, options: Namespace) -> None:
        torch.manual_seed(0)
        self.model, self.samples, self.batch_size = model.eval(), options.samples, options.batch_size
        visual = model.encoder.clip.visual
        self.images = torch.randn(self.samples, 3, *input_size(visual), device=model.device)
        self.text = tokens_of_texts(model, self.samples)
        self.targets = torch.rand(self.samples, len(model.answers))
        rows, columns = model.encoder.grid
        self.relevance = {
            f"order {i}": ModalityRelevance(
                torch.rand(self.samples, rows * columns), torch.rand(self.text.ids.shape)
            )
            for i in range(options.methods)
        }

    def protocol(self, seen: Callable | None = None):
        scorer = AnswerScorer(self.model.kept_scorer(self.images, self.text), self.targets)
        if seen is not None:
            score = scorer.score
            scorer.score = lambda sample, image, text: seen(image, text) or score(sample, image, text)
        return perturb(
            scorer,
            self.relevance,
            self.text.removable,
            self.text.valid,
            sample_ids=np.arange(self.samples),
            batch_size=self.batch_size,
        )

    def variants(self) -> Mapping[tuple[str, int], int]:
        """How many different variants keep how many tokens: of the image patches, of the text all."""
        counts: Counter[tuple[str, int]] = Counter()

        def seen(image: Tensor | None, text: Tensor | None) -> None:
            if image is not None:
                counts["image", image.shape[1]] += len(image)
            else:
                counts.update(("text", count) for count in (text >= 0).sum(dim=1).tolist())

        self.protocol(seen)
        return counts

    @torch.no_grad()
    def naive(self):
        """Accuracy and probability by full forwards in which removed tokens are masked out of attention."""
        scores = []
        removable = {"image": np.ones((self.samples, self.relevance["order 0"].image.shape[1]), dtype=bool)}
        removable["text"] = self.text.removable.cpu().numpy()
        original = self.model(self.images, self.text).argmax(dim=1)
        for its in self.relevance.values():
            for modality, may in removable.items():
                for positive in (True, False):
                    relevance = getattr(its, modality).double().numpy()
                    rank = np.argsort(
                        removal_order(relevance, seed=0, positive=positive, removable=may), axis=-1
                    )
                    for fraction in FRACTIONS:
                        gone = rank < number_removed(fraction, may.sum(axis=1))[:, None]
                        ignore = torch.from_numpy(gone).to(self.model.device)
                        logits = self.model(self.images, self.text, **{f"{modality}_ignore": ignore})
                        given = logits.argmax(dim=1).cpu()
                        probability = logits.softmax(dim=1).gather(1, original[:, None])[:, 0]
                        accuracy = self.targets.gather(1, given[:, None])[:, 0]
                        scores.append(torch.stack([accuracy, probability.cpu()]))
        return torch.stack(scores)

    @torch.no_grad()
    def image_tower(self) -> Tensor:
        return self.model.encoder.image_tokens(self._images())

    @torch.no_grad()
    def text_tower(self) -> Tensor:
        text = self._text()
        return self.model.encoder.text_tokens(text.ids, text.valid)

    def plain(self, modality: str, count: int) -> Callable[[], Tensor]:
        """The forward of a whole batch at that many tokens, without the tower of the other modality."""
        model, text = self.model, self._text()
        with torch.no_grad():
            image_tokens = model.encoder.image_tokens(self._images())
            text_tokens = model.encoder.text_tokens(text.ids, text.valid)
        keep = torch.arange(count, device=model.device).expand(self.batch_size, -1)

        @torch.no_grad()
        def image() -> Tensor:
            tokens = model.encoder.image_tokens(self._images(), keep=keep)
            return model.answer_logits(tokens, text_tokens, text.valid, keep=keep)

        @torch.no_grad()
        def words() -> Tensor:
            ids, inside = text.ids[:, :count], torch.ones_like(keep, dtype=torch.bool)
            return model.answer_logits(image_tokens, model.encoder.text_tokens(ids, inside), inside)

        return image if modality == "image" else words

    def _images(self) -> Tensor:
        return self.images[torch.arange(self.batch_size, device=self.images.device) % self.samples]

    def _text(self) -> TokenizedText:
        return self.text[torch.arange(self.batch_size, device=self.images.device) % self.samples]


def show(results: dict) -> None:
    times, settings = results["times"], results["settings"]
    variants = sum(row["number"] for row in results["variants"])
    table = Table(
        title=f"Perturbation of {settings['samples']} samples by {settings['methods']} methods: "
        f"{variants} different variants, {times[PROTOCOL]['median_s']:.2f} s",
        title_justify="left",
    )
    for column in ("", "time", "CPU time"):
        table.add_column(column, justify="right" if column else "left")
    for name, key in (
        ("÷ a plain forward of every variant", "ratio_to_forwards"),
        ("÷ the parts of it that the variant changes", "ratio_to_changed_parts"),
        ("faster than a masked forward each", "times_faster_than_naive"),
    ):
        table.add_row(name, f"{results[key]:.2f}", f"{results[f'cpu_{key}']:.2f}")
    console().print(table)


def plot(results: dict, path: Path) -> Path:
    its, settings = results["machine"], results["settings"]
    rows = {
        "every variant's forward": (1 / results["ratio_to_forwards"],),
        "its changed parts": (1 / results["ratio_to_changed_parts"],),
        "naive masked loop": (results["times_faster_than_naive"],),
    }
    note = (
        f"{settings['model']}, {settings['samples']} samples, {settings['methods']} methods; {its['name']}, "
        f"{its['threads']} threads, {its['when'][:10]}, load {its['load']}"
    )
    header = ("time ÷ the perturbation test's",)
    return ratio_chart(
        {"perturbation test = 1": rows}, header, "What the perturbation test costs", note, path
    )
