"""Replace attention, count changed predictions: ``python scripts/attention_causality.py --checkpoint …``."""

from clipmapper.commands.attention_causality import main

if __name__ == "__main__":
    main()
