"""Turn a public data set's official files into a manifest for data=manifest.

clipmapper convert gqa train_balanced_questions.json --images images --split train --output gqa.jsonl
clipmapper convert path_vqa data/train-*.parquet --images images --split train --output path_vqa.jsonl
"""

import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from clipmapper.commands.mistakes import Arguments, mistakes_end_it, some_path
from clipmapper.data.readers.conversion import READERS, WITH_IMAGES, convert
from clipmapper.data.readers.fine_tuning_sets import LANGUAGES
from clipmapper.data.readers.source import Source
from clipmapper.errors import UserError
from clipmapper.host.outputs import check_file, check_folder
from clipmapper.host.stopping import a_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends with exit status 2 and one line on stderr for a mistake of the user's, 130 when interrupted."""
    parser = Arguments(
        prog="clipmapper convert", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=READERS)
    parser.add_argument(
        "questions",
        type=some_path,
        nargs="+",
        help="the official file of questions or captions; of path_vqa all files of the split",
    )
    parser.add_argument(
        "--annotations", type=some_path, help="its file with answers, where they have one (OK-VQA)"
    )
    parser.add_argument(
        "--masks", type=some_path, help="the folder of CLEVR-XAI's masks (0.npy and so on), for clevr"
    )
    parser.add_argument("--language", choices=LANGUAGES, help="of the questions, for slake")
    parser.add_argument(
        "--images",
        type=some_path,
        required=True,
        help="the folder of the images; of path_vqa they are written into it",
    )
    parser.add_argument("--split", choices=("train", "validation", "test"), required=True)
    parser.add_argument("--output", type=some_path, required=True, help="a .jsonl file; it is replaced")
    options = parser.parse_args(arguments)
    with a_command(), mistakes_end_it():
        _convert(options)


def _convert(options: Namespace) -> None:
    first, *more = options.questions
    source = Source(first, options.annotations, options.images, options.masks, options.language, tuple(more))
    try:
        _check_output(options)
        lines, images = convert(options.name, source, options.split, options.output)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    if not options.images.is_dir():
        print(f"warning: --images {options.images}: no such folder yet", file=sys.stderr)
    for note in source.notes():
        print(note)
    print(f"{options.output}: {lines} lines about {images} images")


def _check_output(options: Namespace) -> None:
    """Raises ``UserError`` where the manifest can't be written to ``--output``, or is not to."""
    output, named = options.output, f"--output {options.output}"
    if output.suffix != ".jsonl":
        raise UserError(f"{named}: a manifest of JSON lines is written, so its name ends in .jsonl")
    check_file(output, named)
    if options.name in WITH_IMAGES:
        check_folder(options.images, f"--images {options.images}")
    elif options.images.exists() and not options.images.is_dir():
        raise UserError(f"--images {options.images}: a file, not the folder of the images")
    for file in (*options.questions, options.annotations):
        if file is not None and os.path.realpath(file) == os.path.realpath(output):
            raise UserError(f"{named}: the file that is read; it would be lost")
