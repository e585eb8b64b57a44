"""Turn a public data set's official files into a manifest: ``python scripts/convert.py gqa …``."""

from clipmapper.commands.convert import main

if __name__ == "__main__":
    main()
