"""Write a data set, chosen as for training, as WebDataset shards.

clipmapper make_shards shards/my_data data=manifest data.path=my.jsonl
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from clipmapper.commands.compose import data_settings
from clipmapper.commands.mistakes import Arguments, mistakes_end_it, seed, some_path, whole
from clipmapper.data.shards.files import write_shards
from clipmapper.data.shards.index import webdataset
from clipmapper.errors import UserError
from clipmapper.host.outputs import check_folder
from clipmapper.host.progress import progress
from clipmapper.host.stopping import a_command
from clipmapper.settings.checks import built


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends with exit status 2 and one line on stderr for a mistake of the user's, 130 when interrupted."""
    parser = Arguments(
        prog="clipmapper make_shards", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=some_path, help="for the shards; run again, it goes on")
    parser.add_argument("settings", nargs="+", metavar="data=…", help="the data set, as for scripts/train.py")
    parser.add_argument("--images-per-shard", type=whole(), default=1000)
    parser.add_argument("--seed", type=seed, default=0, help="of the order of the images")
    options = parser.parse_args(arguments)
    with a_command(), mistakes_end_it():
        _make(options)


def _make(options: Namespace) -> None:
    try:
        webdataset()
        check_folder(options.folder, str(options.folder))
        data = built(asdict(data_settings(options.settings)))
        if data.drawn_anew:
            raise UserError(
                "data: the built-in scenes are drawn anew whenever they are needed; choose another data set"
            )
        data.check_training("data")
        images = masks = 0
        for records in data.splits.values():
            images += len(np.unique(records.images))
            masks += sum(record.truth is not None for record in records)
        if masks:
            print(f"{masks:,} records have a mask: shards hold none, so explain on these data as they are")
        with progress("images written to shards", images) as advance:
            written = write_shards(
                data,
                options.folder,
                images_per_shard=options.images_per_shard,
                seed=options.seed,
                progress=advance,
            )
    except KeyboardInterrupt:
        done = len(list(options.folder.glob("*.tar")))
        kept = f"{done} shards are complete: the same command goes on" if done else "no shard is complete yet"
        print(f"interrupted; {kept}", file=sys.stderr)
        sys.exit(130)
    for split, shards in written.items():
        counts = f"{sum(s.images for s in shards)} images, {sum(s.records for s in shards)} records"
        print(f"{split}: {counts} in {len(shards)} shards")
    print(options.folder)
