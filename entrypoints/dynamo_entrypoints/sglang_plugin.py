"""Entry point `sglang.srt.plugins`: SGLang calls `register` in each of its processes."""

from __future__ import annotations


def register() -> None:
    from dynamo_connectors.sglang.plugin import install

    install()
