"""SGLang adapter: translates HiCacheStorage calls into block-manager calls and nothing else."""
