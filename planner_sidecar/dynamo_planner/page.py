"""The decision page: one HTML text with plots drawn as SVG, no script and nothing fetched from elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from .history import Sight
from .profile_file import Profile

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 900, 190, 48, 20, 10
_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:24px;color:#1c2733;background:#fff;max-width:960px}
h1{font-size:20px}h2{font-size:16px;margin:28px 0 4px}figure{margin:6px 0 14px}
figcaption{font-size:13px;color:#4a5a6a}svg{width:100%;height:auto;background:#f7f9fb}
text{font:11px system-ui,sans-serif;fill:#4a5a6a}table{border-collapse:collapse;width:100%;font-size:13px}
td,th{text-align:left;padding:3px 10px 3px 0;border-bottom:1px solid #e3e8ee;vertical-align:top}
.key{display:inline-block;width:14px;height:3px;margin:0 4px 3px 10px}
"""
Point = tuple[float, float]


def render_page(pools: Mapping[str, Iterable[Sight]], decisions: Sequence[Mapping[str, Any]], mode: str) -> str:
    """The whole page. `decisions` are the log's short entries, oldest first."""
    body = "".join(_pool(name, list(sights)) for name, sights in pools.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="15">'
        f"<title>dynamo-planner</title><style>{_STYLE}</style></head><body>"
        f"<h1>dynamo-planner <small>({escape(mode)})</small></h1>{body}{_table(decisions)}</body></html>"
    )


def render_profile(profile: Profile, engine: str) -> str:
    """The two measured curves of one engine."""
    drawn = []
    for title, colour, points in (
        ("Prefill: seconds over prompt tokens", "#1f6fb5", list(profile.prefill)),
        ("Decode: seconds per token over batch", "#2c8a4b", [(batch, seconds) for batch, _, seconds in profile.decode]),
    ):
        frame = _Frame(0.0, max((x for x, _ in points), default=1.0), max((y for _, y in points), default=1.0))
        drawn.append(_figure(title, "", frame, frame.line(points, colour) if points else "", ""))
    rows = [
        f"<tr><td>{batch:.0f}</td><td>{kv:.0%}</td><td>{s * 1e3:.2f} ms</td></tr>" for batch, kv, s in profile.decode
    ]
    table = f"<table><tr><th>batch</th><th>KV use</th><th>a token</th></tr>{''.join(rows)}</table>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Profile</title>'
        f"<style>{_STYLE}</style></head><body><h1>Profile of {escape(engine)}</h1>{''.join(drawn)}{table}</body></html>"
    )


def _pool(name: str, sights: list[Sight]) -> str:
    title = f"<h2>Pool {escape(name)}</h2>"
    if len(sights) < 2:
        return f"{title}<p>Nothing to draw before the second look.</p>"
    last = sights[-1]
    now = f"{last.current} replicas, {last.desired} wanted" + _share(", {:.1%} within the targets", last.attained)
    return f"{title}<p>{escape(now)}</p>{_demand(sights)}{_replicas(sights)}{_attainment(sights)}"


def _demand(sights: list[Sight]) -> str:
    """The forecast is drawn at the time it is for, so that band and truth can be compared."""
    until = sights[-1].at_seconds + sights[-1].horizon_seconds
    rate = _series(sights, lambda seen: seen.rate)
    ahead = [seen for seen in sights if seen.upper is not None]
    upper = [(seen.at_seconds + seen.horizon_seconds, seen.upper or 0.0) for seen in ahead]
    lower = [(seen.at_seconds + seen.horizon_seconds, seen.lower or 0.0) for seen in ahead]
    frame = _Frame(sights[0].at_seconds, until, max((y for _, y in (*rate, *upper)), default=1.0))
    band = frame.area(upper, lower, "#bcd7f2") if len(upper) > 1 else ""
    keys = _key("#1f6fb5", "requests/s") + _key("#bcd7f2", "forecast band, drawn where it is due")
    return _figure("Demand", keys, frame, band + frame.line(rate, "#1f6fb5"))


def _replicas(sights: list[Sight]) -> str:
    current, desired = _series(sights, lambda seen: seen.current), _series(sights, lambda seen: seen.desired)
    most = max(y for _, y in (*current, *desired))
    frame = _Frame(sights[0].at_seconds, sights[-1].at_seconds, max(1.0, most))
    keys = _key("#2c8a4b", "there or starting") + _key("#d9822b", "wanted")
    return _figure("Replicas", keys, frame, frame.steps(desired, "#d9822b") + frame.steps(current, "#2c8a4b"))


def _attainment(sights: list[Sight]) -> str:
    points = _series(sights, lambda seen: seen.attained)
    if not points:
        return "<p>No targets are judged in this pool.</p>"
    frame = _Frame(sights[0].at_seconds, sights[-1].at_seconds, 1.0)
    return _figure("SLO attainment", _key("#8a3ffc", "share within the targets"), frame, frame.line(points, "#8a3ffc"))


class _Frame:
    """Maps (seconds, value) to the drawing; values start at zero."""

    def __init__(self, start: float, end: float, most: float) -> None:
        self.start, self.end = start, max(end, start + 1.0)
        self.most = most if most > 0 else 1.0

    def at(self, point: Point) -> str:
        x = _LEFT + (_WIDTH - _LEFT) * (point[0] - self.start) / (self.end - self.start)
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * min(max(point[1], 0.0), self.most) / self.most
        return f"{x:.1f},{y:.1f}"

    def line(self, points: list[Point], colour: str) -> str:
        path = " ".join(map(self.at, points))
        return f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>'

    def steps(self, points: list[Point], colour: str) -> str:
        corners = [point for old, new in pairwise(points) for point in (old, (new[0], old[1]))]
        return self.line([*corners, points[-1]], colour)

    def area(self, upper: list[Point], lower: list[Point], colour: str) -> str:
        path = " ".join(map(self.at, [*upper, *reversed(lower)]))
        return f'<polygon fill="{colour}" points="{path}"/>'

    def axes(self, unit: str) -> str:
        marks = []
        for share in (0.0, 0.5, 1.0):
            y = float(self.at((self.start, share * self.most)).partition(",")[2])
            marks.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y}" y2="{y}" stroke="#dfe6ec"/>')
            marks.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{share * self.most:.3g}</text>')
        span = self.end - self.start
        text = f"{span / 60:.0f} min" if span >= 120 else f"{span:.0f} s"
        note = f"{text} in all, newest on the right" if unit == "time" else f"0 to {self.end:g}"
        marks.append(f'<text x="{_LEFT}" y="{_HEIGHT - 5}">{note}</text>')
        return "".join(marks)


def _figure(title: str, keys: str, frame: _Frame, drawing: str, unit: str = "time") -> str:
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}"'
    return (
        f"<figure><figcaption>{escape(title)}{keys}</figcaption><svg {box}>{frame.axes(unit)}{drawing}</svg></figure>"
    )


def _key(colour: str, text: str) -> str:
    return f'<span class="key" style="background:{colour}"></span>{escape(text)}'


def _series(sights: list[Sight], pick: Callable[[Sight], float | None]) -> list[Point]:
    return [(seen.at_seconds, value) for seen in sights if (value := pick(seen)) is not None]


def _share(text: str, value: float | None) -> str:
    return "" if value is None else text.format(value)


def _table(decisions: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for entry in list(decisions)[-40:][::-1]:
        cells = (
            str(entry.get("at", "")),
            str(entry.get("pool", "")),
            f"{entry['current']} → {entry['desired']}",
            str(entry["reason"]),
            str(entry["explanation"]),
        )
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>at</th><th>pool</th><th>replicas</th><th>reason</th><th>why</th></tr>"
    return f"<h2>Last decisions</h2><table>{head}{''.join(rows)}</table>"
