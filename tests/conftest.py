"""Shapes and types in signatures are checked while the tests run (and only then); how the suite is run."""

import gc
import os
import signal
from pathlib import PurePath

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook
from xdist.scheduler import LoadScopeScheduling

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
_SHARING = {"test_wandb": "test_commands"}
# The files that take longest are begun first, or one worker would be left with one of them at the end.
_LONGEST = (
    "test_commands", "test_processes", "test_config", "test_captioning", "test_pretrain", "test_record_runs",
    "test_training", "test_nothing_lost", "test_loggers", "test_caption_runs", "test_method_table",
    "test_caption_decoding", "test_more_methods", "test_explaining_captions", "test_half_precision",
)  # fmt: skip


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite takes two workers (of about 1.5 GiB each); chosen files or tests none."""
    chosen = config.option.file_or_dir or config.option.keyword or config.option.usepdb
    return 0 if chosen else 2


def _group(path: str) -> str:
    name = PurePath(path).stem
    return _SHARING.get(name, name)


class _ByFile(LoadScopeScheduling):
    """Tests of a file stay together, for they share what is expensive to make.

    Not by ``xdist_group``: xdist 3.8 writes the group where pytest 9.2 no longer looks, and every test is
    alone.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log) -> _ByFile:
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(_group(item.path), len(order)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from what imports have left: that is there for good."""
    gc.collect()
    gc.freeze()
