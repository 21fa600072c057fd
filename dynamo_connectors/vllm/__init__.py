"""vLLM adapter: translates KVConnectorBase_V1 calls into block-manager calls and nothing else."""
