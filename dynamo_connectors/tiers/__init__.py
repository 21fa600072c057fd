"""The places that can hold a block, each behind the one `Tier` contract."""
