"""What `gpu_engine` is made of: engines side by side, the loads put on them, and the verdict on the raw figures."""
