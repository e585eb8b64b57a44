"""Score trained models on any data set: ``python scripts/evaluate.py checkpoint=… data=… split=…``."""

from clipmapper.cli import evaluate

if __name__ == "__main__":
    evaluate()
