"""Run by SGLang's interpreter: the real argument parser with our plugin in it, many command lines in one process.

Reads a JSON list of command lines, writes a JSON list of what became of each.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any


def outcome(arguments: list[str]) -> dict[str, Any]:
    from sglang.srt.server_args import prepare_server_args

    errors = io.StringIO()
    sys.argv[1:] = arguments
    try:
        with contextlib.redirect_stderr(errors):
            record = prepare_server_args(arguments)
    except SystemExit as stop:
        return {"code": stop.code, "stderr": errors.getvalue()}
    extra = record.hicache_storage_backend_extra_config
    return {"code": None, "backend": record.hicache_storage_backend, "extra": json.loads(extra or "{}")}


def engine_outcome(fields: dict[str, Any]) -> dict[str, Any]:
    """`Engine(...)` builds and resolves the same record without a command line; `dummy` needs no model."""
    from sglang.srt.server_args import ServerArgs

    record = ServerArgs(model_path="dummy", **fields)
    try:
        record.resolve_once()
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None, "backend": record.hicache_storage_backend}


if __name__ == "__main__":
    from sglang.srt.plugins import load_plugins

    load_plugins()
    cases = json.loads(sys.stdin.read())
    results = [outcome(case) if isinstance(case, list) else engine_outcome(case) for case in cases]
    print("RESULTS " + json.dumps(results))
