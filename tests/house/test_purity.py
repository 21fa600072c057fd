"""The import rules of CONTRIBUTING.md, read from the syntax trees: rooms, arrows, circles and pure cores."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house.import_graph import Module, cycles, load, packages_above, parse, targets
from tests.house.repository import PACKAGES, ROOT

# Package -> the packages of ours that it may import.
ARROWS = {
    "dynamo_kernels": set(),
    "dynamo_connectors": {"dynamo_kernels"},
    "dynamo_proxy": set(),
    "dynamo_planner": set(),
    "dynamo_entrypoints": {"dynamo_kernels", "dynamo_connectors", "dynamo_proxy", "dynamo_planner"},
}
ADAPTERS = ("dynamo_connectors.vllm", "dynamo_connectors.sglang")
# Foreign top-level package -> the modules of ours that may import it.
ROOMS = {
    "vllm": ("dynamo_connectors.vllm", "dynamo_entrypoints.vllm_plugin"),
    "sglang": ("dynamo_connectors.sglang", "dynamo_entrypoints.sglang_plugin"),
    "nixl": ("dynamo_connectors.transport",),
    "nixl_cu12": ("dynamo_connectors.transport",),
    "nixl_cu13": ("dynamo_connectors.transport",),
}
IMPURE = {
    *(
        "torch",
        "triton",
        "vllm",
        "sglang",
        "nixl",
        "nixl_cu12",
        "nixl_cu13",
        "zmq",
        "aiohttp",
        "uvloop",
        "requests",
    ),
    *(
        "asyncio",
        "threading",
        "multiprocessing",
        "concurrent",
        "subprocess",
        "socket",
        "ssl",
        "selectors",
        "time",
    ),
}
# What a core must be given instead of fetching: (module, attribute) pairs; "random.Random(seed)" stays allowed.
IMPURE_ATTRIBUTES = {("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}
PURE_TABLE = ROOT / "tests" / "house" / "pure_modules.txt"


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return load()


def inside(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def place(module: Module, line: int) -> str:
    return f"{module.path.relative_to(ROOT)}:{line}"


def pure_paths() -> list[str]:
    lines = PURE_TABLE.read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_table_names_every_package(modules: dict[str, Module]) -> None:
    assert set(ARROWS) == set(PACKAGES)
    assert set(PACKAGES) <= set(modules)


def test_engines_and_nixl_stay_in_their_rooms(modules: dict[str, Module]) -> None:
    wrong = [
        f"{place(module, item.line)} imports {item.module}"
        for module in modules.values()
        for item in module.imports
        if (top := item.module.split(".")[0]) in ROOMS and not inside(module.name, ROOMS[top])
    ]
    assert not wrong, "\n".join(wrong)


def test_no_arrow_points_upward(modules: dict[str, Module]) -> None:
    wrong = [
        f"{place(module, item.line)} imports {item.module}"
        for module in modules.values()
        for item in module.imports
        if (top := item.module.split(".")[0]) in PACKAGES
        and top != (own := module.name.split(".")[0])
        and top not in ARROWS[own]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_never_imports_an_adapter(modules: dict[str, Module]) -> None:
    wrong = []
    for module in modules.values():
        if not module.name.startswith("dynamo_connectors") or inside(module.name, ADAPTERS):
            continue
        for item in module.imports:
            named = f"{item.module}.{item.name}" if item.name else item.module
            if inside(named, ADAPTERS):
                wrong.append(f"{place(module, item.line)} imports {named}")
    assert not wrong, "\n".join(wrong)


def test_adapters_do_not_import_each_other(modules: dict[str, Module]) -> None:
    vllm, sglang = ADAPTERS
    wrong = [
        f"{place(module, item.line)} imports {item.module}"
        for module in modules.values()
        for item in module.imports
        for own, other in ((vllm, sglang), (sglang, vllm))
        if inside(module.name, (own,)) and inside(f"{item.module}.{item.name}", (other,))
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles(modules: dict[str, Module]) -> None:
    edges = {
        name: {t for item in module.imports if item.at_import_time for t in targets(item, modules)}
        for name, module in modules.items()
    }
    assert cycles(edges) == []


def impurities(module: Module, modules: dict[str, Module]) -> list[str]:
    """Everything impure in `module` and in what of ours it imports, its packages' __init__ included."""
    found: list[str] = []
    seen: set[str] = set()
    queue = [module.name]
    while queue:
        name = queue.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        current = modules[name]
        queue += packages_above(name)
        for item in current.imports:
            if item.typing_only:
                continue
            if item.module.split(".")[0] in IMPURE:
                found.append(f"{place(current, item.line)} imports {item.module}")
            queue += targets(item, modules)
        found += impure_calls(current)
    return found


def impure_calls(module: Module) -> list[str]:
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, name = node.value.id, node.attr
            if (owner, name) in IMPURE_ATTRIBUTES or (owner == "random" and name != "Random"):
                found.append(f"{place(module, node.lineno)} uses {owner}.{name}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            found.append(f"{place(module, node.lineno)} opens a file")
    return found


@pytest.mark.parametrize("path", pure_paths())
def test_pure_cores_stay_pure(path: str, modules: dict[str, Module]) -> None:
    module = next((m for m in modules.values() if m.path == ROOT / path), None)
    if module is None:
        pytest.fail(f"{PURE_TABLE.name} names {path}, which does not exist", pytrace=False)
    found = impurities(module, modules)
    assert not found, "\n".join(found)


# -- the checks themselves ------------------------------------------------------------------------------------------
def small_house(**sources: str) -> dict[str, Module]:
    house = {}
    for name, source in sources.items():
        dotted = name.replace("__", ".")
        house[dotted] = parse(dotted, ROOT / f"{dotted}.py", source)
    return house


def test_impurity_is_found_through_another_module() -> None:
    house = small_house(
        dynamo_proxy="",
        dynamo_proxy__policy="from . import clock",
        dynamo_proxy__clock="def f():\n    import time\n    return time.time()",
        dynamo_proxy__ok="import random\nif TYPE_CHECKING:\n    import torch\nR = random.Random(1)",
        dynamo_proxy__dice="import random\nx = random.random()\ny = open('f')",
    )
    house["dynamo_proxy.policy"] = parse("dynamo_proxy.policy", Path(ROOT / "p.py"), "from dynamo_proxy import clock")
    assert impurities(house["dynamo_proxy.policy"], house) == ["dynamo_proxy.clock.py:2 imports time"]
    assert impurities(house["dynamo_proxy.ok"], house) == []
    assert len(impurities(house["dynamo_proxy.dice"], house)) == 2


def test_relative_imports_are_resolved() -> None:
    module = parse("a.b.c", Path("c.py"), "from . import d\nfrom ..e import f\nfrom .g import h")
    assert [(item.module, item.name) for item in module.imports] == [
        ("a.b", "d"),
        ("a.e", "f"),
        ("a.b.g", "h"),
    ]
    package = parse("a.b", Path("__init__.py"), "from .c import d")
    assert package.imports[0].module == "a.b.c"


def test_circles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"], ["d"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
