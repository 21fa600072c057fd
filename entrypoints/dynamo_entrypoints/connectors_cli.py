"""`dynamo-connectors`: what an operator asks of an installation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dynamo_connectors import __version__
from dynamo_connectors.doctor.examine import examine
from dynamo_connectors.doctor.finding import Plan, is_healthy
from dynamo_connectors.doctor.report import as_json, render

app = typer.Typer(
    help="KV tiering, KV-aware routing and planning for unchanged vLLM and SGLang.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def version() -> None:
    """Prints our version."""
    typer.echo(__version__)


@app.command()
def doctor(
    kvbm_host_dram_gb: Annotated[
        float | None, typer.Option(min=0, help="Host memory you mean to give to KV, in GB.")
    ] = None,
    kvbm_nvme_path: Annotated[Path | None, typer.Option(help="Directory of the nvme_ssd tier.")] = None,
    kvbm_nvme_gb: Annotated[float | None, typer.Option(min=0, help="Disk space for KV, in GB.")] = None,
    kvbm_object_url: Annotated[str | None, typer.Option(help="s3://bucket/prefix of the object_store tier.")] = None,
    kvbm_object_endpoint_url: Annotated[str | None, typer.Option(help="Its S3 service, http://host:port.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable report.")] = False,
) -> None:
    """Looks at engines, plugins, NIXL, GPU, memory, disk and bucket. Exits 1 when something would not work.

    Most of its time an installed engine imports itself: that proves that it finds us.
    """
    plan = Plan(kvbm_host_dram_gb, kvbm_nvme_path, kvbm_nvme_gb, kvbm_object_url, kvbm_object_endpoint_url)
    with Console(stderr=True).status("looking at this machine (an engine takes a while to import)"):
        findings = examine(plan, os.environ)
    if json_:
        typer.echo(as_json(findings))
    else:
        render(findings, Console())
    raise typer.Exit(0 if is_healthy(findings) else 1)


@app.command()
def calibrate(
    again: Annotated[bool, typer.Option("--again", help="Measure even if figures are on disk.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable figures.")] = False,
) -> None:
    """Measures the copy paths of every GPU here, keeps the figures and prints what they choose. Exits 1 without one."""
    import torch
    from dynamo_kernels import calibration

    if not torch.cuda.is_available():
        typer.echo("no GPU here: nothing to calibrate", err=True)
        raise typer.Exit(1)
    for index in range(torch.cuda.device_count()):
        made = calibration.calibrate_fully(torch.device("cuda", index), again)
        typer.echo(calibration.as_json(made) if json_ else calibration.table(made))


def main() -> None:
    """Console entry point; bad usage exits with 2."""
    app()
