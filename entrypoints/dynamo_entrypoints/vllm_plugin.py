"""`vllm.general_plugins`: vLLM calls `register` once in every one of its processes."""

from __future__ import annotations

import logging
import sys

from dynamo_connectors.errors import PluginError

log = logging.getLogger(__name__)


def register() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from dynamo_connectors.vllm.launch_flags import CONNECTOR_NAME, install

    # Under vLLM's MultiConnector statistics travel under the class's name, and are looked up by it.
    for name in (CONNECTOR_NAME, "DynamoConnector"):
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "dynamo_connectors.vllm.connector", "DynamoConnector")
    # Only processes that parse a command line, or build an engine in Python, have imported this.
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is not None:
        try:
            install(arg_utils.EngineArgs)
        except PluginError as error:
            # Somebody who does not use us must still be able to start; `--kv-connector` itself then fails to parse.
            log.warning("dynamo: %s", error)
