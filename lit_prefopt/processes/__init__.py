"""Noise processes: noising, training target, reverse step and sampler."""
