"""Write a data set as WebDataset shards.

python scripts/make_shards.py shards/my_data data=manifest data.path=my.jsonl
"""

from clipmapper.commands.make_shards import main

if __name__ == "__main__":
    main()
