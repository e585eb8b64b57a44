"""Replace attention by matrices with and without the same effect, and count changed predictions.

On a trained CLIPmapper, with questions of its own data:

    python scripts/attention_causality.py --checkpoint last.ckpt --samples 100 --output outputs/causality.json

On a text classifier (a folder of Hugging Face weights; without one, a small BERT with random weights):

    python scripts/attention_causality.py --classifier FOLDER --texts lines.txt
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipmapper.errors import UserError
from clipmapper.evaluation.attention_causality import attention_causality

_BATCH = 16


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a trained CLIPmapper")
    parser.add_argument("--classifier", type=Path, help="folder of a Hugging Face text classifier")
    parser.add_argument("--texts", type=Path, help="a text file, one text a line, for --classifier")
    parser.add_argument("--layers", type=int, nargs="*", help="attention sub-layers from 0 (default: all)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/attention_causality.json"))
    options = parser.parse_args(arguments)
    try:
        predict = (_classifier if options.checkpoint is None else _clipmapper)(options)
        results = attention_causality(predict, options.layers, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    named = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"settings": named, **results}, indent=2) + "\n")
    print(f"{results['samples']} samples, sub-layers {results['layers']} of {results['sublayers']}")
    for name, found in results["substitutes"].items():
        share, shannon = found["predictions_changed"], found["jensen_shannon"]
        print(
            f"{name:10} changed {100 * share['mean']:5.1f} % [{100 * share['low']:.1f}, "
            f"{100 * share['high']:.1f}]  total variation {found['total_variation']:.3f}  "
            f"Jensen-Shannon {'-' if shannon is None else f'{shannon:.3f}'}"
        )
    print(options.output)
    return 0


def _clipmapper(options: argparse.Namespace) -> list[Callable[[], Tensor]]:
    from clipmapper.models.build import load
    from clipmapper.training.explained_records import samples_of
    from clipmapper.training.instances import built

    model = load(options.checkpoint)
    if "data" not in model.description:
        raise UserError(f"{options.checkpoint}: does not say which data it was trained on")
    data = built(model.description["data"])
    samples = samples_of(model, data, "validation", options.samples, options.seed)

    def forward(rows: Tensor) -> Tensor:
        # Every token of the last block as well, as in a trace.
        return model(samples.images[rows], samples.text[rows], only_class_token=False)

    return [lambda rows=rows: forward(rows) for rows in torch.arange(len(samples)).split(_BATCH)]


def _classifier(options: argparse.Namespace) -> list[Callable[[], Tensor]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig
    from transformers import BertForSequenceClassification as Bert

    torch.manual_seed(options.seed)
    if options.classifier is None:
        # Longer than a head is wide, so that effective attention differs from A, and with weights so large
        # that attention is sharp: with the usual ones it is as good as uniform.
        config = BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, num_labels=4, attn_implementation="sdpa", initializer_range=1.0,
        )  # fmt: skip
        model = Bert(config).eval()
        ids = torch.randint(1, 200, (options.samples, 40))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        if options.texts is None:
            raise UserError("--classifier needs --texts, a text file with one text a line")
        for path in (options.classifier, options.texts):
            if not path.exists():
                raise UserError(f"{path}: no such file or folder")
        model = AutoModelForSequenceClassification.from_pretrained(
            options.classifier, attn_implementation="sdpa"
        ).eval()
        lines = [line for line in options.texts.read_text().splitlines() if line.strip()]
        tokenizer = AutoTokenizer.from_pretrained(options.classifier)
        inputs = dict(tokenizer(lines[: options.samples], padding=True, truncation=True, return_tensors="pt"))
    parts = torch.arange(len(inputs["input_ids"])).split(_BATCH)
    return [lambda rows=rows: model(**{k: v[rows] for k, v in inputs.items()}).logits for rows in parts]


if __name__ == "__main__":
    sys.exit(main())
