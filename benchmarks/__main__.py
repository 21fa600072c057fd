"""`python -m benchmarks` lists the benches, `NAME [option ...]` runs one, `all` runs every one with its defaults."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def benches() -> dict[str, str]:
    """Name -> first line of its docstring, read without importing it."""
    found: dict[str, str] = {}
    for path in sorted(HERE.glob("*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    del found["__main__"]
    return found


def run(name: str, arguments: list[str]) -> int:
    print(f"== {name}", flush=True)
    return int(importlib.import_module(f"benchmarks.{name}").main(arguments))


def main(arguments: list[str]) -> int:
    known = benches()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        for name, title in known.items():
            print(f"  {name:<20} {title}")
        return 0
    name, *options = arguments
    if name == "all":
        return max([run(each, options) for each in known], default=0)
    if name not in known:
        print(f"benchmarks: no bench {name!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    return run(name, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
