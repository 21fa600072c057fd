"""Peers: blocks that another engine of the fleet holds, read over NIXL under a lease and behind a fence."""
