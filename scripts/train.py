"""Train CLIPmapper and explain it: ``python scripts/train.py``."""

from clipmapper.cli import train

if __name__ == "__main__":
    train()
