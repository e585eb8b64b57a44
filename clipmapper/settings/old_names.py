"""Names that have changed: what older runs, checkpoints and settings call something, and its name today.

They are compared, never imported: only today's names lead anywhere.
"""

from typing import TypeVar

# Settings that there are no more; their section says as much.
GONE = frozenset({"training._target_"})

_Value = TypeVar("_Value")

# Every ``_target_`` that was ever in ``conf/`` and is no more.
_TARGETS = {
    "clipmapper.data.scenes_vqa.ScenesVQA": "clipmapper.data.world.data.ScenesVQA",
    "clipmapper.data.scenes_captions.ScenesCaptions": "clipmapper.data.world.data.ScenesCaptions",
    "clipmapper.data.manifest.manifest_data": "clipmapper.data.readers.manifest.manifest_data",
    "clipmapper.data.huggingface.huggingface_data": "clipmapper.data.readers.huggingface.huggingface_data",
    "clipmapper.data.vqa_v2.vqa_v2_data": "clipmapper.data.readers.vqa_v2.vqa_v2_data",
    "clipmapper.data.coco_captions.coco_captions_data": (
        "clipmapper.data.readers.coco_captions.coco_captions_data"
    ),
    "clipmapper.data.flickr_captions.flickr_captions_data": (
        "clipmapper.data.readers.flickr_captions.flickr_captions_data"
    ),
    "clipmapper.data.shard_data.ShardData": "clipmapper.data.shards.data.ShardData",
    "clipmapper.training.relevance_callback.RelevanceCallback": (
        "clipmapper.training.callback.RelevanceCallback"
    ),
}


def name_today(value: _Value) -> _Value | str:
    """Today's name of a ``_target_``; anything else is given back as it is."""
    return _TARGETS.get(value, value) if isinstance(value, str) else value
