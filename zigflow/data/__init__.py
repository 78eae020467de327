"""Data: sample order, global batches, indexed shards, decoding and loading."""
