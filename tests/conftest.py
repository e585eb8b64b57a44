"""Shapes and types in signatures are checked while the tests run (and only then); how the suite is run."""

import gc
import os
import signal

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook("clipmapper", "beartype.beartype")
pytest.register_assert_rewrite("support")

# A busy machine is not a failure.
settings.register_profile(
    "unhurried", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")

# A shell starts background jobs with Ctrl-C ignored, which they hand on to the processes that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that share one run of scripts/train.py (training_models.trained_by_script): one worker has them all.
_ONE_WORKER = {"test_commands", "test_wandb"}
# The files that take longest are begun first, or one worker would be left with one of them at the end.
_LONGEST = ("test_captioning", "test_commands", "test_training", "test_caption_runs")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite takes two workers (of about 1.5 GiB each); chosen files or tests none."""
    chosen = config.option.file_or_dir or config.option.keyword or config.option.usepdb
    return 0 if chosen else 2


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file stay together, for they share what is expensive to make."""

    def group(item: pytest.Item) -> str:
        name = item.path.stem
        return "test_commands" if name in _ONE_WORKER else name

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    order = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(group(item), len(order)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what imports have left: that is there for good."""
    gc.collect()
    gc.freeze()
