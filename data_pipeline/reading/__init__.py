"""From folders of shards to global batches."""
