"""Compare methods over models, seeds and scores: ``python scripts/study.py study=quick``."""

from clipmapper.cli import study

if __name__ == "__main__":
    study()
