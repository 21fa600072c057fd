"""What every test of the house runs under; the machinery itself lives in `tests/house/`."""

from hypothesis import settings

# A slow machine is no failure.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

pytest_plugins = ["tests.house.plugin"]
