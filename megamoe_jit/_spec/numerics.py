"""What a kernel may compute in more than one way: its numeric options, as one value.

A field here and its use in a room of the kernels are an option; the kernel's `Config`, its name, the command line's
flags and the documents follow from the field (docs/how-to/add-a-numeric-option.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from megamoe_jit._errors import ConfigError
from megamoe_jit._spec.checks import check_flag
from megamoe_jit._text import shown


def _option(default: bool, *, off: str, on: str, what: str) -> Any:
    """A field: its words in the name of a kernel (empty for none), and what it does, for people."""
    return field(default=default, metadata={"words": (off, on), "what": what})


class _Once(type):
    """Equal values are one object: a call looks its kernel up by it, and hashing an identity costs nothing."""

    _made: ClassVar[dict[tuple[Any, ...], Any]] = {}

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        made = super().__call__(*arguments, **options)
        return cls._made.setdefault((cls, made.values()), made)


@dataclass(frozen=True, slots=True, eq=False)
class Numerics(metaclass=_Once):
    """Numeric options, each a compile-time constant of a kernel: `fast_math` is `Config::kFastMath`."""

    fast_math: bool = _option(True, off="exact", on="fast", what="approximate exponential and reciprocal in SwiGLU")
    float32_out: bool = _option(False, off="", on="f32out", what="y in float32, not rounded to bf16")

    def __post_init__(self) -> None:
        for option in fields(self):
            check_flag(option.name, getattr(self, option.name))

    def __reduce__(self) -> tuple[type[Numerics], tuple[Any, ...]]:
        """A copy, and what another process sends, is the one object too."""
        return Numerics, self.values()

    def __str__(self) -> str:
        """As the arguments of a call, without those that are not in the name of a kernel."""
        words = {option.name: option.metadata["words"] for option in fields(self)}
        return ", ".join(f"{name}={flag}" for name, flag in self.options().items() if words[name][flag])

    def values(self) -> tuple[Any, ...]:
        """Options in the order of the fields."""
        return tuple(getattr(self, option.name) for option in fields(self))

    def options(self) -> dict[str, Any]:
        """Options by name."""
        return asdict(self)

    def constants(self) -> list[tuple[str, str]]:
        """Their constants in `Config`."""
        return [
            ("k" + name.title().replace("_", ""), "true" if flag else "false") for name, flag in self.options().items()
        ]

    def words(self) -> list[str]:
        """What the name of a kernel says of them."""
        words = [option.metadata["words"][getattr(self, option.name)] for option in fields(self)]
        return [word for word in words if word]

    def changed(self) -> dict[str, Any]:
        """What is not the default, by name: arguments of a call."""
        return {o.name: getattr(self, o.name) for o in fields(self) if getattr(self, o.name) != o.default}

    def flags(self) -> list[str]:
        """Flags of the command line for what is not the default."""
        return [f"--{'' if flag else 'no-'}{name.replace('_', '-')}" for name, flag in self.changed().items()]

    @classmethod
    def named(cls, words: Iterable[str]) -> Numerics:
        """The value with these words; options that none of them is about have their defaults.

        Raises:
            ConfigError: a word is none of an option's.
        """
        pairs = ((o.name, flag, o.metadata["words"][flag]) for o in fields(cls) for flag in (False, True))
        known = {word: (name, flag) for name, flag, word in pairs if word}
        given = list(words)
        for word in given:
            if word not in known:
                raise ConfigError(f"{shown(word)} is no numeric option; allowed: {', '.join(known)}")
        return cls(**dict(known[word] for word in given))

    @classmethod
    def changes(cls) -> list[str]:
        """The word of each option that is not its default's."""
        return [word for o in fields(cls) if (word := o.metadata["words"][not o.default])]


#: The value of a call's options in their order, without running Python once it is known. Raises as `Numerics` does, and
#: `TypeError` for what cannot be hashed; only values of bools are kept.
numerics_of = functools.lru_cache(maxsize=None, typed=True)(Numerics)
