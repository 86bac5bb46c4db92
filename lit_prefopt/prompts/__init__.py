"""Prompt sets: read prompts from text, tables, JSON and pair shards."""
