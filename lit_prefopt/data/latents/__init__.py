"""Cached latents, prompt embeddings and reference errors."""
