"""Model families, one a file, found through registry.py. Knows shards and weights; nothing of requests or sockets."""
