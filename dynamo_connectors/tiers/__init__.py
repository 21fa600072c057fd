"""The places that can hold a block: an index that decides, and stores that keep the bytes."""
