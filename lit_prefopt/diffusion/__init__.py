"""Noising, denoising errors, random draws, roll-outs and sampling."""
