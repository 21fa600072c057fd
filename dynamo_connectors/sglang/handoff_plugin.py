"""Registers `--disaggregation-transfer-backend dynamo` with SGLang, which lists its backends and has no register."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NoReturn

from dynamo_connectors.config import flag_of
from dynamo_connectors.errors import DynamoConnectorsError, PluginError
from dynamo_connectors.sglang import compat
from dynamo_connectors.sglang.handoff_settings import (
    BACKEND,
    HANDOFF_SETTINGS,
    VARIABLE,
    refuse_request,
    translate_handoff,
)

_UTILS = "sglang.srt.disaggregation.utils"
_CHOICES = "sglang.srt.arg_groups.choices.add_disagg_transfer_backend_choices"
_QUEUES = (
    "sglang.srt.disaggregation.decode.DecodePreallocQueue._check_if_req_exceed_kv_capacity",
    "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue._check_if_req_exceed_kv_capacity",
)
#: What our classes are built on, since 0.5.23.
_NEEDED = (
    f"{_UTILS}.get_kv_class",
    f"{_UTILS}.TransferBackend",
    "sglang.srt.disaggregation.common.conn.CommonKVManager.supports_deferred_decode_kv_release",
    "sglang.srt.disaggregation.common.conn.CommonKVReceiver.ensure_abort_notified",
)
_USAGE_ERROR = 2

Hook = Callable[..., Any]


def hooks() -> list[tuple[str, Hook, str]]:
    """(target, hook, type). None on an SGLang that lacks what we need: it then knows no such backend, and says so."""
    try:
        choose = compat.resolve(_CHOICES)
        for target in _NEEDED:
            compat.resolve(target)
    except PluginError:
        return []
    choose([BACKEND])
    _name_backend(compat.resolve(f"{_UTILS}.TransferBackend"))
    found: list[tuple[str, Hook, str]] = [
        (f"{compat.SERVER_ARGS}.add_cli_args", _add_flags, "AFTER"),
        (f"{compat.SERVER_ARGS}.from_cli_args", _translate_flags, "BEFORE"),
        (compat.resolution_hook(), _translate_record, "BEFORE"),
        (f"{_UTILS}.get_kv_class", _kv_class, "AROUND"),
    ]
    if compat.is_scheduler_process():
        for target in _QUEUES:
            compat.resolve(target)
        found += [(target, _guard, "AROUND") for target in _QUEUES]
    return found


def _name_backend(backends: Any) -> None:
    """A member of SGLang's closed enumeration."""
    if BACKEND not in backends._value2member_map_:
        member = object.__new__(backends)
        member._name_, member._value_ = BACKEND.upper(), BACKEND
        backends._value2member_map_[BACKEND] = backends._member_map_[BACKEND.upper()] = member


def _add_flags(_result: object, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
    for setting, text in HANDOFF_SETTINGS.items():
        parser.add_argument(flag_of(setting), default=None, help=text)


def _translate_flags(_cls: type, arguments: Any, *_: object, **__: object) -> None:
    try:
        translate_handoff(arguments, {name: getattr(arguments, name, None) for name in HANDOFF_SETTINGS}, os.environ)
    except DynamoConnectorsError as error:
        _stop(error)


def _translate_record(record: Any, *_: object, **__: object) -> None:
    """`Engine(disaggregation_transfer_backend="dynamo", ...)`; after a command line all is told already."""
    if VARIABLE not in os.environ:
        translate_handoff(record, {}, os.environ)


def _kv_class(original: Hook, backend: Any, kind: Any) -> Any:
    if getattr(backend, "value", None) != BACKEND or kind.value == "kvargs":
        return original(backend, kind)
    # Later than this module: it stands on the engine's classes.
    from dynamo_connectors.sglang.disaggregation import kv_classes

    return kv_classes()[kind.value]


def _guard(original: Hook, queue: Any, request: Any, *more: Any, **options: Any) -> Any:
    """Refuses, as the engine does a prompt that is too long, what would end it or its neighbours."""
    fake = compat.resolve(f"{_UTILS}.FAKE_BOOTSTRAP_HOST")
    if getattr(queue.transfer_backend, "value", None) == BACKEND and request.bootstrap_host != fake:
        refusal = refuse_request(request.bootstrap_host, request.bootstrap_port, request.bootstrap_room)
        if refusal is not None:
            prepare_abort = compat.resolve(f"{_UTILS}.prepare_abort")
            prepare_abort(request, f"Invalid request: {refusal}", status_code=HTTPStatus.BAD_REQUEST)
            queue.scheduler.output_streamer.stream_output([request], request.return_logprob)
            return True
    return original(queue, request, *more, **options)


def _stop(error: DynamoConnectorsError) -> NoReturn:
    sys.stderr.write(f"dynamo: {error}\n")
    sys.stderr.flush()
    raise SystemExit(_USAGE_ERROR)
