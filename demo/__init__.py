"""`make demo`: the main job on two real vLLM replicas, told as three small experiments."""
