"""A folder of shards: its index, how it is written, and how it is read."""
