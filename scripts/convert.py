"""Turn a public data set's official files into a manifest for data=manifest.

python scripts/convert.py gqa train_balanced_questions.json --images images --split train --output gqa.jsonl
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from clipmapper.data.conversion import READERS, Source, convert
from clipmapper.errors import UserError, UserErrors
from clipmapper.outputs import check_file
from clipmapper.stopping import a_command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=READERS)
    parser.add_argument("questions", type=Path, help="the official file with questions, or with captions")
    parser.add_argument(
        "--annotations", type=Path, help="its file with answers, where they have one (OK-VQA)"
    )
    parser.add_argument("--images", type=Path, required=True, help="the folder of the images themselves")
    parser.add_argument("--split", choices=("train", "validation", "test"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file; an old one is replaced")
    options = parser.parse_args(arguments)
    with a_command():
        _convert(options)


def _convert(options: argparse.Namespace) -> None:
    source = Source(options.questions, options.annotations, options.images)
    try:
        check_file(options.output, f"--output {options.output}")
        lines, images = convert(options.name, source, options.split, options.output)
    except UserError as error:
        for line in error.lines if isinstance(error, UserErrors) else [error]:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    for note in source.reading.notes(options.questions):
        print(note)
    print(f"{options.output}: {lines} lines about {images} images")


if __name__ == "__main__":
    main()
