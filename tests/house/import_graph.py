"""Who imports whom, read from the syntax trees: no module is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.house.repository import PACKAGES


@dataclass(frozen=True)
class Import:
    """One imported name. `module` is what the statement names, `name` what it takes from it, if anything."""

    module: str
    name: str | None
    line: int
    typing_only: bool
    at_import_time: bool


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def base_of(module: str, is_package: bool, level: int) -> str:
    """The package that a relative import of `level` dots inside `module` starts from."""
    parts = module.split(".")
    keep = len(parts) - level + (1 if is_package else 0)
    return ".".join(parts[:keep])


def imports_in(
    node: ast.AST, module: str, is_package: bool, typing: bool = False, top: bool = True
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, None, child.lineno, typing, top)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                base = ".".join(filter(None, [base_of(module, is_package, child.level), base]))
            for alias in child.names:
                yield Import(base, alias.name, child.lineno, typing, top)
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for part in child.body:
                yield from imports_in(ast.Module([part], []), module, is_package, True, top)
            for part in child.orelse:
                yield from imports_in(ast.Module([part], []), module, is_package, typing, top)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_in(child, module, is_package, typing, top and not inside)


def parse(name: str, path: Path, source: str) -> Module:
    tree = ast.parse(source)
    found = tuple(imports_in(tree, name, path.name == "__init__.py"))
    return Module(name, path, tree, found)


def load() -> dict[str, Module]:
    """Every module of our packages by its dotted name."""
    modules: dict[str, Module] = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = parse(name, path, path.read_text())
    return modules


def targets(item: Import, modules: dict[str, Module]) -> set[str]:
    """Our modules that this import names itself: `from p import m` is m where m is a module, else p."""
    if item.name is not None and f"{item.module}.{item.name}" in modules:
        return {f"{item.module}.{item.name}"}
    return {item.module} & set(modules)


def packages_above(name: str) -> Iterator[str]:
    """`a.b.c` -> a, a.b: what importing it executes first."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        yield ".".join(parts[:count])


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Each set of modules that reach one another (Tarjan), sorted; no entry when the graph has no circle."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for successor in edges.get(node, ()):
            if successor not in index:
                visit(successor)
                low[node] = min(low[node], low[successor])
            elif successor in stack:
                low[node] = min(low[node], index[successor])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in edges.get(node, ()):
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found
