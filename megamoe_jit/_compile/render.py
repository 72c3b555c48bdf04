"""From a `KernelSpec` to one self-contained CUDA source.

The Jinja2 template is rendered, then every `#include "room/file.cuh"` is replaced by that file's text, once.
NVRTC therefore gets no include path and sees exactly one text: what is hashed for the cache is what was
compiled, and a changed room can never leave a stale kernel behind. `#line` marks with fixed virtual names
keep compiler messages, SASS listings and profilers pointing at the room and its line, wherever the
package is installed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamoe_jit._errors import ConfigError, RenderError, ToolchainError
from megamoe_jit._files import read_text, stays_inside
from megamoe_jit._settings.settings import get_settings
from megamoe_jit._spec.compilable import Compilable

VIRTUAL_ROOT = "/megamoe_jit/kernels_src"

#: those that say what stands where: the rest is the compiler's business
_DIRECTIVE = re.compile(r"\n([^\S\n]*#[^\S\n]*(include|pragma|ifdef|ifndef|if|endif|line)\b(.*))")
_QUOTED = re.compile(r'^\s*"([^"]+)"\s*(//.*|/\*.*\*/\s*)?$')
_CONDITIONS = ("if", "ifdef", "ifndef")
_ONCE = re.compile(r"\s+once\b")
_LINE_MARK = re.compile(r'^#line (\d+) "([^"]+)"$')
#: What a wrong template raises beside `jinja2.TemplateError`; of these, a syntax error is one of the Python made of it.
_REFUSED = (
    *(ArithmeticError, LookupError, TypeError, ValueError, OSError),
    *(RecursionError, MemoryError, SyntaxError),
)
_INSTALL = "Run: pip install 'jinja2>=3.1'"
_TAG_END = ("#}", "%}")
_FILE_BYTES = 1 << 18
_SOURCE_BYTES = 1 << 24
_DEEPEST = 50  #: includes in each other


@dataclass(frozen=True, slots=True)
class RenderedSource:
    """One translation unit.

    Attributes:
        text: what the compiler gets.
        files: names relative to the kernel directory, in the order in which they were first entered.
    """

    text: str
    files: tuple[str, ...]


def kernels_dir() -> Path:
    """The directory kernels are rendered from: the packaged one unless the settings name another.

    Raises:
        ConfigError: that is no directory, or not to be read.
    """
    chosen = get_settings().kernels_src
    if chosen is None:
        from importlib import resources

        return Path(str(resources.files("megamoe_jit") / "kernels_src"))
    if not chosen.is_dir():
        raise ConfigError(f"MEGAMOE_JIT_KERNELS_SRC={str(chosen)!r} is no directory; allowed: one of kernel sources")
    if not os.access(chosen, os.R_OK | os.X_OK):
        raise ConfigError(f"MEGAMOE_JIT_KERNELS_SRC={str(chosen)!r} cannot be read")
    return chosen


def render(spec: Compilable) -> RenderedSource:
    """Render the template of `spec` and flatten its includes.

    The text depends on the spec and the bytes of the files alone, not on where they lie or on the clock.

    Args:
        spec: the kernel to render.

    Returns:
        The source and the files it was made of.

    Raises:
        RenderError: a template or include is wrong; says in which file and line.
    """
    root = kernels_dir()
    flat = _Flattener(root)
    template = spec.template
    flat.enter(template, _filled(root, template, spec.template_variables()))
    return RenderedSource("\n".join(flat.out) + "\n", tuple(flat.files))


def sources_digest() -> str:
    """What the files of all kernels are, as sha256 over their names and bytes; nothing is rendered.

    Raises:
        ConfigError: there is no directory of them.
        RenderError: one cannot be read.
    """
    root, digest = kernels_dir(), hashlib.sha256()
    for name in sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.cuh*")):
        try:
            data = _read(root, name).encode()
        except (OSError, UnicodeDecodeError) as error:
            raise RenderError(f"cannot read {name!r} in {root}: {_reason(error)}") from error
        digest.update(b"%d %d " % (len(name), len(data)) + name.encode() + data)
    return digest.hexdigest()


def source_lines(text: str) -> dict[tuple[str, int], str]:
    """Where each line of a flattened source came from: (virtual file, line) to its text."""
    table: dict[tuple[str, int], str] = {}
    name, number = "", 0
    for line in text.split("\n"):
        mark = _LINE_MARK.match(line)
        if mark:
            name, number = mark[2], int(mark[1])
            continue
        table.setdefault((name, number), line)
        number += 1
    return table


def _read(root: Path, name: str) -> str:
    return read_text(os.path.join(root, name), _FILE_BYTES).replace("\r\n", "\n")


def _reason(error: OSError | UnicodeDecodeError) -> str | None:
    return error.strerror if isinstance(error, OSError) else "not UTF-8 text"


def _virtual(name: str) -> str:
    return f"{VIRTUAL_ROOT}/{name}"


def _marked(name: str, text: str) -> tuple[str, list[int]]:
    """Add `#line` after template tags, which swallow or repeat lines; also each line's original number."""
    lines: list[str] = []
    numbers: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        lines.append(line)
        numbers.append(number)
        if line.rstrip().endswith(_TAG_END):
            lines.append(f'#line {number + 1} "{_virtual(name)}"')
            numbers.append(number + 1)
    return "\n".join(lines), numbers


def _filled(root: Path, template: str, values: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ModuleNotFoundError:
        raise ToolchainError(
            f"rendering needs the Python package 'jinja2', which is not installed. {_INSTALL}"
        ) from None

    from megamoe_jit._compile.template import render_template

    numbers: dict[str, list[int]] = {}

    def load(name: str) -> tuple[str, str]:
        try:
            text = _read(root, name)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise jinja2.TemplateNotFound(name) from None
        except OSError as error:
            raise OSError(f"cannot read {name!r} in {root}: {error.strerror}") from error
        marked, numbers[name] = _marked(name, text)
        return marked, _virtual(name)

    try:
        return render_template(load, template, values)
    except jinja2.TemplateNotFound as error:
        raise RenderError(f"kernel template {error.name!r} does not exist in {root}") from error
    except (jinja2.TemplateError, *_REFUSED) as error:
        raise RenderError(_explained(error, template, numbers)) from error


def _explained(error: Exception, template: str, numbers: dict[str, list[int]]) -> str:
    """An error of a template with its place; `numbers` has the original numbers of each template's lines."""
    name, line = _jinja_position(error, template)
    known = numbers.get(name, [])
    line = known[line - 1] if 0 < line <= len(known) else line
    what = str(error) if not isinstance(error, RecursionError) else "it is nested too deep"
    return f"{_virtual(name)}({line}): {what or type(error).__name__}"


def _jinja_position(error: BaseException, default: str) -> tuple[str, int]:
    """Template and line of an error: from a syntax error itself, else from the innermost template frame."""
    import jinja2

    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.name or default, error.lineno
    name, line = default, 0
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(VIRTUAL_ROOT + "/"):
            name, line = file[len(VIRTUAL_ROOT) + 1 :], trace.tb_lineno
        trace = trace.tb_next
    return name, line


@dataclass(slots=True)
class _Flattener:
    """Depth-first replacement of includes; `stack` holds the files being entered."""

    root: Path
    out: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    size: int = 0

    def enter(self, name: str, text: str) -> None:
        self.files.append(name)
        self.stack.append(name)
        self.size += len(text)
        if self.size > _SOURCE_BYTES:
            raise RenderError(f"{_virtual(name)}: with this file the source has more than {_SOURCE_BYTES} characters")
        text = "\n" + text.removesuffix("\n")  # each line begins after one, which is found much faster than by `^`
        file, number, depth = _virtual(name), 0, 0
        self.out.append(f'#line 1 "{file}"')
        copied, counted = 1, 0  # up to where the text is in `out`, and its lines in `number`
        for found in _DIRECTIVE.finditer(text):
            line, word, operand = found.groups()
            begin = found.start(1)
            number += text.count("\n", counted, begin)
            counted = begin
            if word == "line" and (mark := _LINE_MARK.match(line)):
                file, number = mark[2], int(mark[1]) - 1
            elif word in _CONDITIONS:
                depth += 1
            elif word == "endif":
                depth -= 1
            include = word == "include"
            if not include and not (word == "pragma" and _ONCE.match(operand)):
                continue
            if include and depth:
                raise RenderError(f"{file}({number}): #include inside #if is not allowed; each file enters once")
            if begin > copied:
                self.out.append(text[copied : begin - 1])
            copied = found.end() + 1
            if include:
                self._include(operand, file, number)
            else:
                self.out.append("")
        if copied <= len(text):
            self.out.append(text[copied:])
        self.stack.pop()

    def _include(self, operand: str, file: str, number: int) -> None:
        where = f"{file}({number})"
        quoted = _QUOTED.match(operand)
        if not quoted:
            raise RenderError(
                f'{where}: #include{operand.rstrip()} is not allowed; use #include "folder/file.cuh", '
                "relative to the kernel directory (the compiler gets no include path)"
            )
        name = quoted[1]
        if name in self.stack:
            chain = " -> ".join([*self.stack[self.stack.index(name) :], name])
            raise RenderError(f"{where}: include cycle {chain}")
        if len(self.stack) > _DEEPEST:
            raise RenderError(f"{where}: includes are nested more than {_DEEPEST} deep")
        if name in self.files:
            self.out.append("")
            return
        if not stays_inside(name):
            raise RenderError(f'{where}: #include "{name}" must be a plain path relative to the kernel directory')
        try:
            text = _read(self.root, name)
        except (OSError, UnicodeDecodeError) as error:
            raise RenderError(f'{where}: cannot include "{name}" from {self.root}: {_reason(error)}') from error
        self.enter(name, text)
        self.out.append(f'#line {number + 1} "{file}"')
