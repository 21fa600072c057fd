"""The `dynamo-proxy` console command."""

from dynamo_proxy.cli import main

__all__ = ["main"]
