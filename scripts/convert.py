"""Turn a public data set's official files into a manifest for data=manifest.

python scripts/convert.py gqa train_balanced_questions.json --images images --split train --output gqa.jsonl
"""

import argparse
import sys
from pathlib import Path

from clipmapper.data.conversion import READERS, Source, convert
from clipmapper.errors import UserError, UserErrors


def main() -> None:
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
    options = parser.parse_args()
    source = Source(options.questions, options.annotations, options.images)
    try:
        lines, images = convert(options.name, source, options.split, options.output)
    except UserError as error:
        for line in error.lines if isinstance(error, UserErrors) else [error]:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    for note in source.reading.notes(options.questions):
        print(note)
    print(f"{options.output}: {lines} lines about {images} images")


if __name__ == "__main__":
    main()
