"""What every test of the house runs under; the machinery itself lives in `tests/house/`."""

pytest_plugins = ["tests.house.plugin"]
