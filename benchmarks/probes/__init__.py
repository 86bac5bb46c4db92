"""Programs that run against the package of any checkout."""
