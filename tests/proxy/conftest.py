"""Settings of the proxy's tests."""

from hypothesis import HealthCheck, settings

# The machine is shared: a slow example says nothing.
settings.register_profile("proxy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("proxy")
