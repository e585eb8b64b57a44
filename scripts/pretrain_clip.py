"""Train the small CLIP of the built-in scenes: ``python scripts/pretrain_clip.py``."""

from clipmapper.cli import pretrain_clip

if __name__ == "__main__":
    pretrain_clip()
