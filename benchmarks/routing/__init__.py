"""What the routing benches share: a C engine and load generator, simulated engines, peers, traces."""
