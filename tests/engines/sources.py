"""An engine's real sources without what they need: chosen modules come from its package, all others are stand-ins.

Engines import native libraries, GPUs and whole frameworks at the top of their files. The modules that a plug-in meets
are loaded as they are; whatever else they import is a stand-in that takes any use and does nothing.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Anything", "RealSources"]


class _Permissive(type):
    """The class of stand-ins: every attribute is there, every use of it gives another one."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        made = _Permissive(name, (Anything,), {})
        setattr(cls, name, made)
        return made

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__dict__.get("_derived_") is not True and len(args) == 1 and not kwargs and _is_definition(args[0]):
            return args[0]  # a decorator
        return super().__call__(*args, **kwargs)

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())

    def __bool__(cls) -> bool:
        return False

    def __eq__(cls, other: object) -> bool:
        return cls is other

    def __hash__(cls) -> int:
        return id(cls)

    def __lt__(cls, other: object) -> bool:
        return False

    __gt__ = __le__ = __ge__ = __lt__

    def __enter__(cls) -> Any:
        return cls

    def __exit__(cls, *_: Any) -> None:
        pass


def _is_definition(value: Any) -> bool:
    return isinstance(value, types.FunctionType | type | staticmethod | classmethod)


class Anything(metaclass=_Permissive):
    """A stand-in: any argument, any attribute, any call."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __init_subclass__(cls, **_: Any) -> None:
        cls._derived_ = cls.__module__ != __name__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return _Permissive(name, (Anything,), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and _is_definition(args[0]) else Anything()

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Any:
        return iter(())

    def __getitem__(self, _: Any) -> Any:
        return Anything()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _StandIn(types.ModuleType):
    __path__: list[str] = []

    def __init__(self, name: str, passed_on: dict[str, str]) -> None:
        super().__init__(name)
        self.__dict__["_passed_on_"] = passed_on  #: names that the real package has from a module that is real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        source = self._passed_on_.get(name)
        if source is not None:
            return getattr(importlib.import_module(source), name)
        made = _Permissive(name, (Anything,), {"__module__": __name__})
        setattr(self, name, made)
        return made


class _Loader(importlib.abc.Loader):
    def __init__(self, passed_on: dict[str, str]) -> None:
        self.passed_on = passed_on

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name, self.passed_on)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class RealSources(importlib.abc.MetaPathFinder):
    """While it is entered, imports of an engine come from here.

    Args:
        root: the folder that has the engine's package.
        package: its name.
        real: modules that are loaded from their files.
        stand_ins: other packages, which are none of this environment.
    """

    def __init__(self, root: Path, package: str, real: Iterable[str], stand_ins: Iterable[str] = ()) -> None:
        self.root, self.package, self.real = Path(root), package, frozenset(real)
        self.stand_ins = frozenset(stand_ins)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if top != self.package and top not in self.stand_ins:
            return None
        if name in self.real:
            file = self.root.joinpath(*name.split("."))
            package = (file / "__init__.py").is_file()
            where = file / "__init__.py" if package else file.with_suffix(".py")
            places = [str(file)] if package else None
            return importlib.util.spec_from_file_location(name, where, submodule_search_locations=places)
        made = importlib.machinery.ModuleSpec(name, _Loader(self._passed_on(name)), is_package=True)
        if name == self.package:
            made.submodule_search_locations = [str(self.root / name)]
        return made

    def _passed_on(self, name: str) -> dict[str, str]:
        """What a package imports from its real modules, which it has by the same names."""
        file = self.root.joinpath(*name.split("."), "__init__.py")
        if not file.is_file():
            return {}
        found = {}
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom):
                source = ".".join(filter(None, [name if node.level else "", node.module]))
                if source in self.real or source.startswith(f"{name}."):
                    found.update({alias.asname or alias.name: source for alias in node.names})
        return found

    def __enter__(self) -> RealSources:
        self.forget()
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.meta_path.remove(self)
        self.forget()

    def forget(self) -> None:
        """Drop what was imported of the engine and of its stand-ins."""
        for name in [name for name in sys.modules if name.partition(".")[0] in {self.package, *self.stand_ins}]:
            del sys.modules[name]
