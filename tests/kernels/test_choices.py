"""Which path is taken, from figures and without them, and that every answer explains itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dynamo_kernels.choices import Case, Choice, Direction, Figure, Path, Point, best, choose, parse_path, rule_of_thumb
from dynamo_kernels.errors import CopyError

LOAD = Case(Direction.H2D, 16 << 10, 4096)
STORE = Case(Direction.D2H, 16 << 10, 4096)


def figures(**rates: tuple[float, float | None]) -> list[Figure]:
    return [Figure(Choice(Path(name)), rate * 1e9, slowdown) for name, (rate, slowdown) in rates.items()]


#: docs/benchmarks.md, one H200, 16 KiB.
LOADS = figures(dma=(41.3, 0.038), zero_copy=(50.1, 0.070), split=(39.9, 0.040), staged=(52.8, 0.119))
STORES = figures(dma=(44.2, 0.003), zero_copy=(50.2, 0.030), split=(48.6, 0.017), staged=(51.3, 0.054))


def test_a_load_takes_the_fastest_path() -> None:
    chosen = best(LOADS, LOAD)
    assert chosen is not None
    assert chosen.path is Path.STAGED
    assert chosen.why == "measured: 52.8 GB/s, decode +11.9% (fastest of 4 52.8)"


def test_a_store_takes_the_quietest_of_the_fast_ones() -> None:
    chosen = best(STORES, STORE)
    assert chosen is not None
    assert chosen.path is Path.SPLIT


def test_tma_takes_stores_where_it_is_the_quietest() -> None:
    """docs/benchmarks.md, one H200, 2026-11-28; TMA as bulk copies of 16 KiB."""
    measured = figures(
        dma=(43.0, 0.006), zero_copy=(50.2, 0.034), split=(48.4, 0.020), staged=(51.2, 0.054), tma=(51.7, 0.018)
    )
    chosen = best(measured, STORE)
    assert chosen is not None
    assert (chosen.path, chosen.ctas) == (Path.TMA, 2)
    for impossible in (replace(STORE, for_tma=False), replace(STORE, direction=Direction.H2D)):
        other = best(measured, impossible)
        assert other is not None
        assert other.path is not Path.TMA
    # At 64 KiB the engines alone are as fast and quieter.
    longer = best(figures(dma=(52.5, 0.010), tma=(51.7, 0.018)), replace(STORE, fragment_bytes=64 << 10))
    assert longer is not None
    assert longer.path is Path.DMA


def test_of_equally_quiet_stores_the_fast_one_is_taken() -> None:
    for slowdown, path in ((0.024, Path.TMA), (0.026, Path.SPLIT)):
        chosen = best(figures(split=(48.4, 0.020), tma=(51.7, slowdown)), STORE)
        assert chosen is not None
        assert chosen.path is path


def test_of_equally_fast_loads_the_quiet_one_is_taken() -> None:
    chosen = best(figures(dma=(53.0, 0.06), staged=(53.1, 0.12)), LOAD)
    assert chosen is not None
    assert chosen.path is Path.DMA


def test_only_what_is_possible_is_chosen() -> None:
    odd = replace(LOAD, for_kernels=False)
    chosen = best(LOADS, odd)
    assert chosen is not None
    assert chosen.path is Path.DMA
    assert best(LOADS[1:], odd) is None
    apart = best(LOADS, replace(LOAD, has_rows=False))
    assert apart is not None
    assert apart.path is Path.ZERO_COPY


@pytest.mark.parametrize(
    ("case", "path"),
    [
        (LOAD, Path.STAGED),
        (STORE, Path.SPLIT),
        (replace(STORE, has_lines=False), Path.ZERO_COPY),
        (replace(LOAD, has_rows=False), Path.ZERO_COPY),
        (replace(LOAD, fragment_bytes=64 << 10), Path.DMA),
        (replace(LOAD, fragments=64), Path.DMA),
        (replace(STORE, for_kernels=False), Path.DMA),
    ],
)
def test_the_rule_of_thumb(case: Case, path: Path) -> None:
    chosen = rule_of_thumb(case)
    assert (chosen.path, case.allows(chosen.path)) == (path, True)
    assert chosen.why.startswith("rule: ")


def test_the_nearest_point_decides_by_size_then_by_count_never_by_the_other_direction() -> None:
    def only(path: str) -> list[Figure]:
        return figures(**{path: (50.0, None)})

    table = {
        Point(Direction.H2D, 16 << 10, 4096, True): only("staged"),
        Point(Direction.H2D, 16 << 10, 64, True): only("dma"),
        Point(Direction.H2D, 2 << 20, 32, True): only("zero_copy"),
        Point(Direction.D2H, 16 << 10, 4096, True): only("split"),
    }
    for fragment, count, path in (
        (16 << 10, 5000, Path.STAGED),
        (16 << 10, 100, Path.DMA),
        (18 << 10, 9000, Path.STAGED),
        (4 << 20, 4096, Path.ZERO_COPY),
    ):
        assert choose(Case(Direction.H2D, fragment, count), table).path is path
    # One known point says nothing about fragments of another size.
    for fragment in (64 << 10, 512 << 10):
        assert choose(Case(Direction.H2D, fragment, 4096), table).why.startswith("rule: ")
    assert choose(STORE, table).path is Path.SPLIT
    assert choose(replace(STORE, has_lines=False), table).why.startswith("rule: ")


def test_the_setting_wins_where_it_is_possible() -> None:
    assert choose(LOAD, forced=Path.ZERO_COPY).path is Path.ZERO_COPY
    assert choose(LOAD, forced=Path.ZERO_COPY).why == "set by DYNAMO_KERNELS_COPY_PATH"
    assert choose(STORE, forced=Path.TMA).path is Path.TMA
    assert choose(LOAD, forced=Path.TMA).path is Path.STAGED
    assert choose(replace(LOAD, for_kernels=False), forced=Path.STAGED).path is Path.DMA


def test_the_setting_is_a_path_or_auto() -> None:
    assert (parse_path(""), parse_path("auto"), parse_path("staged")) == (None, None, Path.STAGED)
    with pytest.raises(CopyError, match="use auto or one of dma, zero_copy, split, staged, tma"):
        parse_path("fast")
