"""Commands other than the Trainer's, one file each."""
