"""`dynamo-connectors`: what an operator asks of an installation."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from dynamo_connectors import __version__
from dynamo_connectors.config import SETTINGS
from dynamo_connectors.doctor.examine import examine
from dynamo_connectors.doctor.finding import is_healthy
from dynamo_connectors.doctor.plan import plan_of
from dynamo_connectors.doctor.report import as_json, render_one, render_summary
from dynamo_connectors.errors import ConfigError

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


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command` every `--kvbm-*` flag of the engines, for its `**settings`."""
    own = [param for param in inspect.signature(command, eval_str=True).parameters.values() if param.name != "settings"]
    flags = [
        inspect.Parameter(
            setting,
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(None, metavar="VALUE", help=text),
            annotation=str | None,
        )
        for setting, text in SETTINGS.items()
    ]
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    return command


@app.command()
@_with_settings
def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable report, when all is known.")] = False,
    **settings: str | None,
) -> None:
    """Looks at memory, disk, bucket, engines, plugins, NIXL and GPU. Exits 1 when something would not work.

    Takes the --kvbm-* flags of a launch line; one that the engine would refuse ends it at once with exit code 2. Most
    of its time an installed engine imports itself: that proves that it finds us.
    """
    try:
        plan = plan_of({setting: value for setting, value in settings.items() if value is not None})
    except ConfigError as error:
        typer.echo(f"dynamo-connectors doctor: error: {error}", err=True)
        raise typer.Exit(2) from None
    findings = []
    console = Console(stderr=json_)
    with console.status("looking at this machine (an engine takes a while to import)"):
        for finding in examine(plan, os.environ):
            findings.append(finding)
            if not json_:
                render_one(finding, console)
    if json_:
        typer.echo(as_json(findings))
    else:
        render_summary(findings, console)
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
