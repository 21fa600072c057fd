"""What runs inside an engine process: the KV block manager, its tiers, and the vLLM and SGLang adapters."""

__version__ = "0.1.0.dev0"
