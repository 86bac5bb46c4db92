"""Every family of flow models against its stock pipeline, by the same tests."""
