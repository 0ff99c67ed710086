"""What to split and how: the shard plan, linear layers, and what is asked of the links between ranks."""
