"""Several training commands one behind the other in the same two processes: ``two_processes.py JSON``.

What is started by Lightning has the same command line, with settings of Hydra's behind it.
"""

import json
import sys

from clipmapper import cli

for overrides in json.loads(sys.argv[1]):
    cli.train([*overrides, "trainer.devices=2"])
