"""Console command `dynamo-planner`."""

import sys

from dynamo_planner.cli import main as run


def main() -> None:
    """Run the planner with the process's arguments."""
    sys.exit(run())
