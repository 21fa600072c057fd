"""A sidecar that sizes and scales engine replicas from what they already publish."""
