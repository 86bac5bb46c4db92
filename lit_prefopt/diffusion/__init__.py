"""Noising, errors, random draws and samplers."""
