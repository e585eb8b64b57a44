"""Replace attention by matrices with and without the same effect, and count changed predictions.

On a trained CLIPmapper, with questions of its own world:

    python scripts/attention_causality.py --checkpoint last.ckpt --samples 100 --output outputs/causality.json

(the built-in world that it was trained on), or of yours, chosen as for scripts/train.py:

    python scripts/attention_causality.py --checkpoint last.ckpt data=manifest data.path=my.jsonl

On a text classifier, a folder of Hugging Face weights:

    python scripts/attention_causality.py --classifier FOLDER --texts lines.txt

With neither, on a small BERT with random weights. What takes the place of attention A: "effective" (A without
what its values do not see), "efficient" (the distribution of the same effect), "random" and "uniform"
distributions.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clipmapper.errors import UserError
from clipmapper.evaluation.attention_causality import attention_causality, count_forwards
from clipmapper.models.cut_texts import cut_texts_said_once
from clipmapper.outputs import check_file
from clipmapper.relevance.substitution import names_of_calls
from clipmapper.stopping import a_command
from clipmapper.training.run_folder import write_json

_BATCH = 16
Forwards = list[Callable[[], Tensor]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 2 after a line on stderr for a mistake of the user's, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a trained CLIPmapper that answers questions")
    parser.add_argument(
        "--architecture", help="FILE.json, if the checkpoint's architecture is yours and names a tokenizer"
    )
    parser.add_argument(
        "data", nargs="*", metavar="data=…",
        help="the questions' data set, as for scripts/train.py (default: the world that --checkpoint knows)",
    )  # fmt: skip
    parser.add_argument("--classifier", type=Path, help="folder of a Hugging Face text classifier")
    parser.add_argument("--texts", type=Path, help="a text file, one text a line, for --classifier")
    parser.add_argument(
        "--layers", type=int, nargs="+",
        help="attention sub-layers, from 0, in the order in which they run (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--list", action="store_true", help="print the sub-layers' numbers and names, and stop"
    )
    parser.add_argument("--samples", type=int, default=64, help="at most so many (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of samples and random matrices (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/attention_causality.json"),
        help="the JSON file that is written (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    with a_command():
        return _run(options)


@cut_texts_said_once()
def _run(options: argparse.Namespace) -> int:
    try:
        _check(options)
        model, predict = (_classifier if options.checkpoint is None else _clipmapper)(options)
        names = names_of_calls(model, predict[0])
        if options.list:
            print("\n".join(f"{number:3} {name}" for number, name in enumerate(names)))
            return 0
        with tqdm(total=count_forwards(predict), desc="forwards", leave=False) as bar:
            results = attention_causality(predict, options.layers, options.seed, progress=bar.update)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    named = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "list"}
    results = {"settings": named, **results, "names": names}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, results)
    _show(results)
    print(options.output)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises ``UserError`` for settings that can't be, before anything is loaded."""
    if options.samples < 1:
        raise UserError(f"--samples {options.samples}: must be at least 1")
    if options.checkpoint is not None and options.classifier is not None:
        raise UserError("--checkpoint and --classifier: give one of them")
    if options.data and options.checkpoint is None:
        raise UserError(f"{options.data[0]}: data are for --checkpoint")
    if (options.classifier is None) != (options.texts is None):
        raise UserError("--classifier and --texts (a text file with one text a line) go together")
    for path in (options.classifier, options.texts):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if options.list:
        return
    check_file(options.output, f"--output {options.output}")


def _show(results: dict) -> None:
    chosen = ", ".join(map(str, results["layers"]))
    print(f"{results['samples']} samples; of {results['sublayers']} attention sub-layers replaced: {chosen}")
    for name, found in results["substitutes"].items():
        share, shannon = found["predictions_changed"], found["jensen_shannon"]
        print(
            f"{name:10} changed {100 * share['mean']:5.1f} % [{100 * share['low']:.1f}, "
            f"{100 * share['high']:.1f}]  largest change of a logit {found['largest_logit_change']:.2g}  "
            f"total variation {found['total_variation']:.3f}  "
            f"Jensen-Shannon {'-' if shannon is None else f'{shannon:.3f}'}"
        )


def _clipmapper(options: argparse.Namespace) -> tuple[nn.Module, Forwards]:
    from clipmapper.models.build import load
    from clipmapper.models.captioner import Captioner
    from clipmapper.settings import data_settings
    from clipmapper.training.checkpoint_data import data_for
    from clipmapper.training.explained_records import samples_of

    given = data_settings(options.data) if options.data else None
    model = load(options.checkpoint, architecture=options.architecture)
    if isinstance(model, Captioner):
        raise UserError(f"{options.checkpoint}: writes captions; predictions are counted of answers")
    data = data_for(model, given, str(options.checkpoint))
    samples = samples_of(model, data, "validation", options.samples, options.seed)

    def forward(rows: Tensor) -> Tensor:
        # Every token of the last block as well, as in a trace.
        return model(samples.images[rows], samples.text[rows], only_class_token=False)

    parts = torch.arange(len(samples)).split(_BATCH)
    return model, [lambda rows=rows: forward(rows) for rows in parts]


def _classifier(options: argparse.Namespace) -> tuple[nn.Module, Forwards]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(options.seed)
    if options.classifier is None:
        print("no --checkpoint and no --classifier: a small BERT with random weights, on random words")
        # Longer than a head is wide, so that effective attention differs from A, and with weights so large
        # that attention is sharp: with the usual ones it is as good as uniform.
        config = BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, num_labels=4, attn_implementation="sdpa", initializer_range=1.0,
        )  # fmt: skip
        model = BertForSequenceClassification(config).eval()
        ids = torch.randint(1, 200, (options.samples, 40))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        model, inputs = _of_folder(options)
    parts = torch.arange(len(inputs["input_ids"])).split(_BATCH)
    return model, [
        lambda rows=rows: model(**{k: v[rows] for k, v in inputs.items()}).logits for rows in parts
    ]


def _of_folder(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        lines = [line for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts {options.texts}: no readable text file ({error})") from error
    if not lines:
        raise UserError(f"--texts {options.texts}: holds no text")
    folder = options.classifier
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"--classifier {folder}: no text classifier with its tokenizer ({line})") from error
    inputs = tokenizer(lines[: options.samples], padding=True, truncation=True, return_tensors="pt")
    return model, dict(inputs)


if __name__ == "__main__":
    sys.exit(main())
