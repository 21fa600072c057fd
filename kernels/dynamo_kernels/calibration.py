"""The figures behind the choices: measured once a device and driver, two seconds a start, and kept on disk."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch

from dynamo_kernels.choices import Case, Choice, Direction, Figure, Path, Point, choose, parse_path
from dynamo_kernels.driver import copy_driver
from dynamo_kernels.plan import Chooser

log = logging.getLogger(__name__)

#: Changes when the figures of an older version must not be used any more.
_FORMAT = 2

Figures = Mapping[Point, tuple[Figure, ...]]
#: Measures points in their order, as far as time goes.
Measure = Callable[[Sequence[Point]], Iterator[tuple[Point, tuple[Figure, ...]]]]


@dataclass(frozen=True)
class Calibration:
    """What was measured on one device so far. `seconds` is what all starts spent on it, compiling included."""

    device: str
    driver: int
    seconds: float
    figures: Figures


def calibration_file(device: str, driver: int, environment: Mapping[str, str]) -> FilePath:
    """Where the figures of a device under a driver are kept."""
    home = environment.get("XDG_CACHE_HOME") or str(FilePath(environment.get("HOME", "/tmp")) / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return FilePath(home) / "dynamo-connectors" / f"copy-{name}-driver{driver}.json"


def as_json(calibration: Calibration) -> str:
    points = [
        {"point": asdict(point), "figures": [asdict(figure) for figure in figures]}
        for point, figures in calibration.figures.items()
    ]
    head = {"format": _FORMAT, "device": calibration.device, "driver": calibration.driver}
    return json.dumps({**head, "seconds": calibration.seconds, "points": points}, indent=1)


def from_json(text: str, device: str, driver: int) -> Calibration:
    """Raises ValueError, KeyError or TypeError unless `text` is what `as_json` wrote for this device and driver."""
    found = json.loads(text)
    if (found["format"], found["device"], found["driver"]) != (_FORMAT, device, driver):
        raise ValueError("written for another device, driver or version")
    figures = {_point(each["point"]): tuple(map(_figure, each["figures"])) for each in found["points"]}
    return Calibration(device, driver, float(found["seconds"]), figures)


def _point(fields: Any) -> Point:
    point = Point(**{**fields, "direction": Direction(fields["direction"])})
    if not (point.fragment_bytes > 0 and point.fragments > 0):
        raise ValueError(f"{point} is no point")
    return point


def _figure(fields: Any) -> Figure:
    chosen = fields["choice"]
    choice = Choice(Path(chosen["path"]), int(chosen["ctas"]), float(chosen["dma_share"]), str(chosen["why"]))
    slowdown = fields["slowdown"]
    rate = float(fields["bytes_per_second"])
    if not rate > 0 or not 0 <= choice.dma_share <= 1 or choice.ctas < 1:
        raise ValueError(f"{fields} is no figure")
    return Figure(choice, rate, None if slowdown is None else float(slowdown))


def load(file: FilePath, device: str, driver: int) -> Calibration | None:
    """None when there is no file, or none that can be trusted."""
    try:
        return from_json(file.read_text(), device, driver)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("dynamo: the copy calibration in %s is not usable (%s); measuring again", file, error)
        return None


def save(calibration: Calibration, file: FilePath) -> None:
    """Whole or not at all. Not being able to is no failure: the next start measures again."""
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as stream:
            temporary = stream.name
            stream.write(as_json(calibration))
        os.replace(temporary, file)
    except OSError as error:
        log.warning("dynamo: the copy calibration could not be kept in %s: %s", file, error)
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def calibrate(device: torch.device, again: bool = False, fragment_bytes: int | None = None) -> Calibration:
    """This device's figures: from disk, and as many of those that are missing there as a start has time for.

    For start-up: takes seconds. `fragment_bytes` is what the engine will copy; figures near to it come first.
    """
    from dynamo_kernels.measuring import measure, telling_points

    name, driver = torch.cuda.get_device_name(device), copy_driver().version
    file = calibration_file(name, driver, os.environ)
    known = None if again else load(file, name, driver)
    made = known or Calibration(name, driver, 0.0, {})
    for more in completed(made, telling_points(fragment_bytes), partial(measure, device)):
        save(more, file)  # each as it comes: a start that is cut off has not measured in vain
        made = more
    return made


def calibrate_fully(device: torch.device, again: bool = False) -> Calibration:
    """All of this device's figures, however long that takes."""
    made, before = calibrate(device, again), -1
    while before < len(made.figures):
        made, before = calibrate(device), len(made.figures)
    return made


def completed(known: Calibration, points: Sequence[Point], measure: Measure) -> Iterator[Calibration]:
    """`known` with one more of the missing `points` each time."""
    started, figures = time.perf_counter(), dict(known.figures)
    for point, found in measure([point for point in points if point not in figures]):
        figures[point] = found
        yield Calibration(known.device, known.driver, known.seconds + time.perf_counter() - started, dict(figures))


def chooser_for(device: torch.device, setting: str) -> Chooser:
    """Choices from the figures on disk, or the rule of thumb: a copy never starts measuring."""
    name, driver = torch.cuda.get_device_name(device), copy_driver().version
    known = load(calibration_file(name, driver, os.environ), name, driver)
    return partial(choose, figures=None if known is None else known.figures, forced=parse_path(setting))


def table(calibration: Calibration) -> str:
    """The figures and the choices, for people."""
    lines = [f"{calibration.device}, driver {calibration.driver}: measured in {calibration.seconds:.2f} s"]
    for point, figures in calibration.figures.items():
        shape = "lines" if point.has_lines else "flat"
        lines.append(f"{point.direction.value} {point.fragment_bytes >> 10} KiB x {point.fragments} {shape}")
        chosen = choose(_case(point), calibration.figures)
        for figure in figures:
            mark = "*" if _same(figure.choice, chosen) else " "
            slower = "" if figure.slowdown is None else f"  decode {figure.slowdown:+.1%}"
            lines.append(f"  {mark} {_describe(figure.choice):<34} {figure.bytes_per_second / 1e9:6.1f} GB/s{slower}")
    return "\n".join(lines)


def _case(point: Point) -> Case:
    return Case(point.direction, point.fragment_bytes, point.fragments, has_lines=point.has_lines)


def _same(one: Choice, other: Choice) -> bool:
    return (one.path, one.ctas, one.dma_share) == (other.path, other.ctas, other.dma_share)


def _describe(choice: Choice) -> str:
    if choice.path in (Path.ZERO_COPY, Path.TMA):
        return f"{choice.path.value}, {choice.ctas} CTAs"
    if choice.path is Path.SPLIT:
        return f"split, {choice.dma_share:.0%} engines, {choice.ctas} CTAs"
    return str(choice.path.value)
