"""Helpers without knowledge of diffusion: files, seeds, fingerprints, devices."""
