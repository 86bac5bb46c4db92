"""Commands beside those of the Trainer, one file each."""
