"""Files, functions and signatures stay small. An exception stands in `ceilings_allowed.txt`, with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.house.repository import PACKAGES, ROOT, tracked_files

MOST = {"file-lines": 400, "function-lines": 60, "parameters": 6}
ALLOWED = ROOT / "tests" / "house" / "ceilings_allowed.txt"
FOLDERS = [*PACKAGES.values(), *(ROOT / name for name in ("tools", "demo", "benchmarks", "tests"))]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Excess:
    where: str
    rule: str
    size: int

    def __str__(self) -> str:
        return f"{self.where}: {self.size} {self.rule}, at most {MOST[self.rule]}"


def functions(node: ast.AST, prefix: str = "", in_class: bool = False) -> Iterator[tuple[str, Function, bool]]:
    """Every function below `node` as (dotted name, node, is it a method with a self or cls)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in child.decorator_list)
            yield prefix + child.name, child, in_class and not static
            yield from functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.", in_class=True)
        else:
            yield from functions(child, prefix, in_class)


def excesses(where: str, source: str) -> list[Excess]:
    found = [Excess(where, "file-lines", len(source.splitlines()))]
    for name, function, is_method in functions(ast.parse(source)):
        place = f"{where}::{name}"
        signature = function.args
        parameters = len(signature.posonlyargs) + len(signature.args) + len(signature.kwonlyargs) - is_method
        found.append(Excess(place, "function-lines", (function.end_lineno or 0) - function.lineno + 1))
        found.append(Excess(place, "parameters", parameters))
    return [excess for excess in found if excess.size > MOST[excess.rule]]


def allowed(text: str) -> dict[tuple[str, str], str]:
    """`PLACE RULE REASON` a line -> {(place, rule): reason}; a line without a real reason is an error."""
    entries: dict[tuple[str, str], str] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        place, rule, *reason = line.split()
        if rule not in MOST or len(reason) < 4:
            raise ValueError(f"{ALLOWED.name}: want `PLACE RULE REASON in four words or more`, got {line!r}")
        entries[place, rule] = " ".join(reason)
    return entries


def python_files() -> list[Path]:
    return [p for p in tracked_files() if p.suffix == ".py" and any(f in p.parents for f in FOLDERS)]


def test_nothing_exceeds_its_ceiling() -> None:
    found = [e for p in python_files() for e in excesses(str(p.relative_to(ROOT)), p.read_text())]
    exceptions = allowed(ALLOWED.read_text())
    too_big = [str(excess) for excess in found if (excess.where, excess.rule) not in exceptions]
    stale = set(exceptions) - {(excess.where, excess.rule) for excess in found}
    assert not too_big, "\n".join(too_big)
    assert not stale, f"no longer needed in {ALLOWED.name}: {sorted(stale)}"


def test_it_sees_the_files() -> None:
    names = {str(path.relative_to(ROOT)) for path in python_files()}
    assert {"tools/bootstrap.py", "tests/house/test_ceilings.py", "dynamo_connectors/__init__.py"} <= names


def test_it_sees_what_is_too_big() -> None:
    long_body = "\n".join(["    pass"] * 60)
    source = f"""
class C:
    def good(self, a, b, c, d, e, f, *args, **kwargs): ...
    @staticmethod
    def many(a, b, c, /, d, *, e, f, g): ...
    def outer(self):
        def inner(a, b, c, d, e, f, g): ...
if True:
    def long():
{long_body.replace("    pass", "        pass")}
"""
    source += "\n" * 400
    found = {(e.where, e.rule, e.size) for e in excesses("f.py", source)}
    assert found == {
        ("f.py", "file-lines", 469),
        ("f.py::C.many", "parameters", 7),
        ("f.py::C.outer.inner", "parameters", 7),
        ("f.py::long", "function-lines", 61),
    }


@pytest.mark.parametrize(
    "line", ["a.py file-lines", "a.py file-lines it is long", "a.py lines because of many reasons"]
)
def test_an_exception_needs_a_reason(line: str) -> None:
    with pytest.raises(ValueError, match="REASON"):
        allowed(line)
