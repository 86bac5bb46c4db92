"""What several tests use: small models, shards, servers, runs in processes of their own."""
