"""The commands: thin mains over Hydra configurations."""

import sys

import hydra
from omegaconf import DictConfig

from clipmapper.errors import UserError
from clipmapper.shipped import shipped_root


@hydra.main(version_base="1.3", config_path=str(shipped_root() / "conf"), config_name="pretrain_clip")
def pretrain_clip(config: DictConfig) -> None:
    from clipmapper.training.pretrain import run_pretraining

    try:
        print(run_pretraining(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
