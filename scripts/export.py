"""Write a trained model as a folder: ``python scripts/export.py checkpoint=… folder=…``."""

from clipmapper.cli import export

if __name__ == "__main__":
    export()
