"""Modules that import and do nothing: SGLang imports torchvision, torchaudio and CUDA kernels that it never calls."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any


class _AnyMeta(type):
    """Class attributes resolve too: transformers reads `InterpolationMode.NEAREST_EXACT` while it is imported."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Anything(metaclass=_AnyMeta):
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> Anything:
        return self

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __iter__(self) -> Iterator[object]:
        return iter(())


class _Placeholder(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  (the import system wants a list)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _AnyMeta(name, (Anything,), {"__module__": self.__name__}) if name[:1].isupper() else Anything()
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, root: str) -> None:
        self._prefix = root + "."

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if fullname.startswith(self._prefix):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in_below(root: str) -> None:
    """Every submodule of `root` becomes importable."""
    sys.meta_path.insert(0, _Finder(root))
