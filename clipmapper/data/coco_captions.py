"""COCO's captions as a data set for captioning."""

from clipmapper.errors import UserError


class CocoCaptions:
    """Not there yet. Raises ``UserError``: no reader of COCO's files has been written."""

    def __init__(self, folder: str) -> None:
        raise UserError(
            f"data.folder={folder}: this version cannot read COCO's captions yet; the built-in scenes have "
            "captions too (data=scenes_captions)"
        )
