"""The format on disk: find, index, read and write tar shards of pairs."""
