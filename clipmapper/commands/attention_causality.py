"""Replace attention by matrices with and without the same effect, and count changed predictions.

On a trained CLIPmapper, with questions of its own world:

    clipmapper attention_causality --checkpoint last.ckpt --samples 100 --output outputs/causality.json

(the built-in world that it was trained on), or of yours, chosen as for scripts/train.py:

    clipmapper attention_causality --checkpoint last.ckpt data=manifest data.path=my.jsonl

On a text classifier, a folder of Hugging Face weights:

    clipmapper attention_causality --classifier FOLDER --texts lines.txt

With neither, on a small BERT with random weights. What takes the place of attention A: "effective" (A without
what its values do not see), "efficient" (the distribution of the same effect), "random" and "uniform"
distributions.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clipmapper.commands.compose import data_settings
from clipmapper.commands.mistakes import Arguments, mistakes_end_it, seed, some_path, whole
from clipmapper.data.text_files import text_lines
from clipmapper.errors import UserError
from clipmapper.evaluation.attention_causality import attention_causality, count_forwards
from clipmapper.host.outputs import check_file
from clipmapper.host.stopping import a_command
from clipmapper.models.tokens import cut_texts_said_once
from clipmapper.models.weight_files import check_finite, read_torch_file
from clipmapper.relevance.substitution import names_of_calls
from clipmapper.tasks.registry import load, task_of
from clipmapper.training.checkpoint_data import data_for
from clipmapper.training.run_folder import write_json

_BATCH = 16
_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"
)  # fmt: skip
Forwards = list[Callable[[], Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends with exit status 2 and one line on stderr for a mistake of the user's, 130 when interrupted."""
    parser = Arguments(
        prog="clipmapper attention_causality",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=some_path, help="a trained CLIPmapper that answers questions")
    parser.add_argument(
        "--architecture", help="FILE.json, if the checkpoint's architecture is yours and names a tokenizer"
    )
    parser.add_argument(
        "data", nargs="*", metavar="data=…",
        help="the questions' data set, as for scripts/train.py (default: the world that --checkpoint knows)",
    )  # fmt: skip
    parser.add_argument("--classifier", type=some_path, help="folder of a Hugging Face text classifier")
    parser.add_argument("--texts", type=some_path, help="a text file, one text a line, for --classifier")
    parser.add_argument(
        "--layers", type=whole(0), nargs="+",
        help="attention sub-layers, from 0, in the order in which they run (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--list", action="store_true", help="print the sub-layers' numbers and names, and stop"
    )
    parser.add_argument("--samples", type=whole(), default=64, help="at most so many (default: 64)")
    parser.add_argument("--seed", type=seed, default=0, help="of samples and random matrices (default: 0)")
    parser.add_argument(
        "--output", type=some_path, default=Path("outputs/attention_causality.json"),
        help="the JSON file that is written (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    with a_command(), mistakes_end_it():
        _run(options)


@cut_texts_said_once()
def _run(options: Namespace) -> None:
    try:
        _check(options)
        model, predict = (_classifier if options.checkpoint is None else _clipmapper)(options)
        names = names_of_calls(model, predict[0])
        if options.list:
            print("\n".join(f"{number:3} {name}" for number, name in enumerate(names)))
            return
        with tqdm(total=count_forwards(predict), desc="forwards", leave=False) as bar:
            results = attention_causality(predict, options.layers, options.seed, progress=bar.update)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    named = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "list"}
    results = {"settings": named, **results, "names": names}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, results)
    _show(results)
    print(options.output)


def _check(options: Namespace) -> None:
    """Raises ``UserError`` for settings that can't be, before anything is loaded."""
    if options.checkpoint is not None and options.classifier is not None:
        raise UserError("--checkpoint and --classifier: give one of them")
    if options.data and options.checkpoint is None:
        raise UserError(f"{options.data[0]}: data are for --checkpoint")
    if options.architecture is not None and options.checkpoint is None:
        raise UserError("--architecture is for --checkpoint")
    if (options.classifier is None) != (options.texts is None):
        raise UserError("--classifier and --texts (a text file with one text a line) go together")
    if options.classifier is not None and not options.classifier.is_dir():
        raise UserError(f"--classifier {options.classifier}: no such folder")
    twice = [layer for n, layer in enumerate(options.layers or ()) if layer in options.layers[:n]]
    if twice:
        raise UserError(f"--layers: {twice[0]} is listed twice")
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


def _clipmapper(options: Namespace) -> tuple[nn.Module, Forwards]:
    given = data_settings(options.data) if options.data else None
    model = load(options.checkpoint, architecture=options.architecture)
    task = task_of(model)
    if not hasattr(model, "answers"):
        raise UserError(f"{options.checkpoint}: it {task.does}; predictions are counted of answers")
    data = data_for(task, model, given, str(options.checkpoint))
    samples = task.samples(model, data, "validation", options.samples, options.seed)

    def forward(rows: Tensor) -> Tensor:
        # Every token of the last block as well, as in a trace.
        return model(samples.images[rows], samples.text[rows], only_class_token=False)

    parts = torch.arange(len(samples)).split(_BATCH)
    return model, [lambda rows=rows: forward(rows) for rows in parts]


def _classifier(options: Namespace) -> tuple[nn.Module, Forwards]:
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


def _of_folder(options: Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    lines = [line for line in text_lines(options.texts, "texts (--texts)") if line.strip()]
    if not lines:
        raise UserError(f"--texts {options.texts}: holds no text")
    folder = options.classifier
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make a tokenizer that knows no word.
        raise UserError(f"--classifier {folder}: no tokenizer in it ({', '.join(_TOKENIZER_FILES)})")
    try:
        for file in sorted(folder.glob("pytorch_model*.bin")):
            read_torch_file(file, mmap=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_finite(model.state_dict())
    except Exception as error:  # a damaged file fails where its reader happens to stumble over it
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--classifier {folder}: no text classifier with its tokenizer ({line})") from error
    inputs = dict(tokenizer(lines[: options.samples], padding=True, truncation=True, return_tensors="pt"))
    tokens, largest = inputs["input_ids"].shape[1], int(inputs["input_ids"].max())
    room = getattr(model.config, "max_position_embeddings", tokens)
    if tokens > room:
        raise UserError(
            f"--texts {options.texts}: one has {tokens} tokens, and --classifier {folder} has room for "
            f"{room}; its tokenizer does not say so (model_max_length)"
        )
    if largest >= (words := model.get_input_embeddings().num_embeddings):
        raise UserError(
            f"--classifier {folder}: its tokenizer has a token {largest}, its model {words} in all"
        )
    return model, inputs
