"""Pair data: files on disk, the order of an epoch, loading, cached latents."""
