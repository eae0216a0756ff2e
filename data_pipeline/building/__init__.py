"""From a corpus to a folder of shards."""
