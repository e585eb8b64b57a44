"""Measure speed: ``python scripts/benchmark.py decoding --help``."""

from clipmapper.benchmarks.command import main

if __name__ == "__main__":
    main()
