"""Explain an answer: ``python scripts/explain.py checkpoint=… image=… question="…"``."""

from clipmapper.cli import explain

if __name__ == "__main__":
    explain()
