"""Records every object of ours that defines `check()` and calls it when the test ends.

A class is instrumented as its module is imported: the recorder is an import hook that wraps `__init__` once. Objects
made during a test are held until its end, except those that nobody else holds any more: they are checked and
dropped early, so that a property test does not keep every slab it ever made. Objects that a module or session
fixture made are checked after each test for as long as they live.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SWEEP_AT = 64
MARK = "__recorded_for_check__"


def names_itself_checkable(cls: type) -> bool:
    """Whether `check` is a plain method without further required arguments."""
    check = inspect.getattr_static(cls, "check", None)
    if not inspect.isfunction(check) or inspect.iscoroutinefunction(check):
        return False
    parameters = list(inspect.signature(check).parameters.values())[1:]
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def classes_of(owner: Any, module_name: str) -> list[type]:
    """The classes that `module_name` defines in `owner`, nested ones included."""
    found: list[type] = []
    for value in list(vars(owner).values()):
        if isinstance(value, type) and value.__module__ == module_name and value is not owner:
            found += [value, *classes_of(value, module_name)]
    return found


class Recorder(MetaPathFinder):
    """Import hook, registry of live objects and judge."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages
        self.in_test = False
        self.made: list[Any] = []
        self.standing: list[weakref.ref[Any]] = []
        self.broken: list[str] = []
        self.sweep_at = SWEEP_AT

    # -- instrumenting ------------------------------------------------------------------------------------------
    def watch_imports(self) -> None:
        sys.meta_path.insert(0, self)
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in self.packages:
                self.instrument_module(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] not in self.packages:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                loader = spec.loader
                if loader is not None and hasattr(loader, "exec_module"):
                    vars(loader)["exec_module"] = self.instrumenting(loader.exec_module)
                return spec
        return None

    def instrumenting(self, exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute(module: ModuleType) -> None:
            exec_module(module)
            self.instrument_module(module)

        return execute

    def instrument_module(self, module: ModuleType) -> None:
        for cls in classes_of(module, module.__name__):
            if names_itself_checkable(cls) and not getattr(cls, "_is_protocol", False):
                self.instrument(cls)

    def instrument(self, cls: type) -> None:
        """Wraps `cls.__init__` so that a finished object is recorded by its outermost constructor."""
        original = cls.__init__  # type: ignore[misc]
        if getattr(original, MARK, False):  # its own, or a base's, which records subclasses too
            return
        # With a __new__ of its own the class took its arguments there; object.__init__ would refuse them.
        bare = original is object.__init__ and cls.__new__ is not object.__new__

        @functools.wraps(original)
        def init(self_: Any, *args: Any, **kwargs: Any) -> None:
            if bare:
                original(self_)
            else:
                original(self_, *args, **kwargs)
            outermost = type(self_).__init__
            if outermost is init or not getattr(outermost, MARK, False):
                self.record(self_)

        vars(init)[MARK] = True
        cls.__init__ = init  # type: ignore[misc]

    # -- recording and judging ----------------------------------------------------------------------------------
    def begin(self) -> None:
        self.in_test = True
        self.broken = []
        self.sweep_at = SWEEP_AT

    def record(self, thing: Any) -> None:
        if not self.in_test:
            self.stand(thing)
            return
        self.made.append(thing)
        if len(self.made) >= self.sweep_at:
            self.sweep()

    def stand(self, thing: Any) -> None:
        # Slots without __weakref__ are judged only inside the test that makes them.
        with contextlib.suppress(TypeError):
            self.standing.append(weakref.ref(thing))

    def sweep(self) -> None:
        """Judges and drops what only this list still holds."""
        made, self.made = self.made, []
        while made:
            thing = made.pop()
            if sys.getrefcount(thing) <= 2:  # the name here and the argument
                self.judge(thing)
            else:
                self.made.append(thing)
        self.sweep_at = max(SWEEP_AT, 2 * len(self.made))

    def judge(self, thing: Any) -> None:
        try:
            thing.check()
        except Exception as error:  # noqa: BLE001 - any failure of a check is the finding
            self.broken.append(f"{type(thing).__module__}.{type(thing).__qualname__}: {type(error).__name__}: {error}")

    def finish(self) -> list[str]:
        """Judges everything alive, forgets the test's objects and returns the broken invariants."""
        self.in_test = False
        made, self.made = self.made, []
        for thing in made:
            self.judge(thing)
        self.standing = [ref for ref in self.standing if ref() is not None]
        for ref in self.standing:
            if (thing := ref()) is not None:
                self.judge(thing)
        broken, self.broken = self.broken, []
        return broken
