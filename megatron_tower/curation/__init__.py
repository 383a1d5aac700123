"""From public text to the four training sets, shard by shard: read, filter, deduplicate, decontaminate, mix, tokenize.

    sources --lines, readers--> rows --filters--> kept --duplicates, contamination--> clean --mixture--> tokens --> data folder

Run:  python -m tools.prepare_data data=debian model=tiny_gemma2            (docs/data.md)
"""
