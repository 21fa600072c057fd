"""A KV-aware routing proxy before engines that already run."""
