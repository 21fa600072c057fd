"""Block copy: moves opaque KV bytes between HBM and host rows."""
