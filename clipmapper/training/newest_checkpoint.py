"""Saving the newest checkpoint of a run."""

from collections.abc import Mapping

from lightning.pytorch.callbacks import ModelCheckpoint


class NewestCheckpoint(ModelCheckpoint):
    """Lightning's, which keeps one file under one name.

    Lightning's own takes paths out of the checkpoint that a run is resumed from, and removes what is there
    when it next saves (anywhere on the disk, for an address such as ``local:///…``). Here a checkpoint says
    nothing about files: the run's settings do.
    """

    @property
    def state_key(self) -> str:
        # As it was called in older checkpoints: Lightning warns of states that it finds no owner of.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Nothing: the next file has the name that the settings give."""
