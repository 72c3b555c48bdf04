"""Options that several commands share: shapes, numbers, numeric options, weight formats, ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from megamoe_jit._cli._io import say
from megamoe_jit._errors import ConfigError
from megamoe_jit._spec.formats import FORMATS, FP8
from megamoe_jit._spec.numerics import Numerics
from megamoe_jit._spec.variants import AUTO, VARIANT_CHOICES

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from megamoe_jit._spec import MoEShape
    from megamoe_jit.heuristics.presets import Preset

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
_Option = Callable[[Callable[..., Any]], Callable[..., Any]]  #: what adds one, or several, to a command


def complete_shape(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The rest of a list of shape names; files are left to the shell."""
    from click.shell_completion import CompletionItem

    from megamoe_jit.heuristics.presets import preset_names

    done, comma, last = incomplete.rpartition(",")
    names = [name for name in (*preset_names(), "all") if name.startswith(last)]
    return [CompletionItem(f"{done}{comma}{name}") for name in names]


def named_shapes(names: str, weights: str | None = None) -> tuple[Preset, ...]:
    """The shapes that a value of `--shapes` names.

    Args:
        names: as somebody typed them.
        weights: the format that the command is asked about; None where it has none. That a model has another is said.

    Raises:
        ConfigError: one is not known, or no such layer; says why.
        CheckpointError: the configuration of a model cannot be read.
    """
    from megamoe_jit.heuristics.presets import Preset, parse_shapes

    def model(path: str) -> Preset:
        from megamoe_jit.checkpoints.sizes import model_shape

        found = model_shape(path)
        if weights == FP8.name and found.weight_format != weights:
            say(
                f"{found.name}: its experts are {found.weight_format} on disk; for a layer that keeps them so, "
                f"add --weight-format {found.weight_format}"
            )
        return Preset(found.name, found.shape, 1, path)

    return parse_shapes(names, model)


def gathered(
    options: Sequence[_Option],
    into: str,
    make: Callable[..., Any],
    names: Iterable[str],
    beside: Iterable[str] = (),
) -> _Option:
    """Adds options whose values the command gets as one.

    Args:
        options: in the order of the help.
        into: what the command gets.
        make: makes it of their values, by name.
        names: of the values.
        beside: names of options of the command's own whose values `make` is told too; None where it has none such.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def call(**given: Any) -> Any:
            told = {name: given.get(name) for name in beside}
            made = make(**{name: given.pop(name) for name in names}, **told)
            return command(**{into: made}, **given)

        added: Callable[..., Any] = call
        for option in reversed(options):
            added = option(added)
        return added

    return add


_SHAPE_OPTIONS = (
    click.option(
        "--shapes",
        "names",
        metavar="NAME[,NAME...]",
        shell_complete=complete_shape,
        help="Shapes by name (see `shapes ls`), `all`, .toml files with a table per shape, or models' folders or "
        "config.json.",
    ),
    click.option("--hidden", type=int, help="Hidden size, instead of --shapes."),
    click.option("--intermediate", type=int, help="Intermediate size of one expert."),
    click.option("--experts", type=int, help="Number of experts, those of all ranks together."),
    click.option("--topk", type=int, help="Experts per token."),
    click.option(
        "--shared", type=int, default=0, show_default=True, help="Shared experts, that every token goes to beside."
    ),
)


def _shapes(names: str | None, shared: int, weights: str | None, **sizes: int | None) -> dict[str, MoEShape]:
    from megamoe_jit._spec import MoEShape

    given = {name: size for name, size in sizes.items() if size is not None}
    if names is not None:
        if given:
            raise click.UsageError(f"--shapes and --{next(iter(given))} exclude each other.")
        return _with_shared({p.name: p.shape for p in named_shapes(names, weights)}, shared)
    if len(given) != len(sizes):
        raise click.UsageError("Name the shapes: --shapes NAME, or all of --hidden --intermediate --experts --topk.")
    shape = MoEShape(**given)
    return _with_shared({f"{shape.hidden}/{shape.intermediate}/{shape.experts}/{shape.topk}": shape}, shared)


def _with_shared(shapes: dict[str, MoEShape], shared: int) -> dict[str, MoEShape]:
    """The layers with so many shared experts; their names say so."""
    if shared == 0:
        return shapes
    widened = per_shape(shapes, lambda name, shape: [(f"{name}+{shared}", replace(shape, shared=shared))])
    return dict(widened)


def per_shape(shapes: Mapping[str, MoEShape], make: Callable[[str, MoEShape], Iterable[_T]]) -> list[_T]:
    """What is made of each shape, one after another; a refusal says of which it speaks."""
    made: list[_T] = []
    for name, shape in shapes.items():
        try:
            made.extend(make(name, shape))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return made


#: `--shapes` and, as the alternative to it, the four sizes of one layer; and `--shared`, for either. The command gets
#: `shapes`: the layers that were asked for, by the name to show them under.
shape_options = gathered(
    _SHAPE_OPTIONS, "shapes", _shapes, ("names", "hidden", "intermediate", "experts", "topk", "shared"), ("weights",)
)

TIMED_SHAPES = "v4-flash,v4-pro,mimo-v2.5,mimo-v2.5-pro"  #: those that were measured beside other kernels

timed_shapes_option = click.option(
    "--shapes",
    "names",
    default=TIMED_SHAPES,
    show_default=True,
    metavar="NAME[,NAME...]",
    shell_complete=complete_shape,
    help="Shapes, each with the experts of one of its ranks.",
)


def timed_tokens_option(default: str) -> Callable[[_F], _F]:
    """Add `--tokens`: some token counts; None stands for the `default` that the help shows."""
    help_ = f"Token counts.  [default: {default}]"
    return click.option("--tokens", callback=number_list(int), metavar="N[,N...]", help=help_)


ranks_option = click.option(
    "--ranks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="GPUs that share the experts of one layer.",
)


run_ranks_option = click.option(
    "--ranks",
    type=click.IntRange(1, 8),
    help="GPUs of this host that share the experts; one process is started for each, unless torchrun has started "
    "them.  [default: torchrun's number, else 1]",
)


def rank_count(ranks: int | None) -> int:
    """The number of ranks that was asked for, or torchrun's."""
    from megamoe_jit._check.collect import joined

    here = joined()
    return ranks if ranks is not None else here[1] if here is not None else 1


def weight_format_option(meaning: str, default: str | None = FP8.name) -> Callable[[_F], _F]:
    """Add `--weight-format`, one of those there are."""
    return click.option(
        "--weight-format",
        "weights",
        type=click.Choice(tuple(FORMATS)),
        default=default,
        show_default=True,
        help=meaning,
    )


sms_option = click.option(
    "--sms",
    "num_sms",
    type=click.IntRange(min=1, max=144),
    default=132,
    show_default=True,
    help="Blocks of the launch: the SMs of the GPU (H100 SXM and H200 have 132, H100 PCIe 114, H20 78).",
)
gpu_option = click.option(
    "--gpu",
    metavar="NAME",
    help="Choose by what was measured on this GPU (h200, 'NVIDIA H200'), or `none`.  [default: this machine's first]",
)


_N = TypeVar("_N", int, float)


def number_list(
    kind: type[_N], least: float = 0, above: bool = True
) -> Callable[[click.Context, click.Parameter, str | None], tuple[_N, ...] | None]:
    """Callback of an option that takes several numbers separated by commas.

    Args:
        kind: int or float.
        least: bound of each.
        above: whether each must be above it, or may be equal.
    """

    def parse(_: click.Context, __: click.Parameter, text: str | None) -> tuple[_N, ...] | None:
        if text is None:
            return None
        word = "whole numbers" if kind is int else "numbers"
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a list of {word} separated by commas") from None
        if not all(value > least or (value == least and not above) for value in values):
            raise click.BadParameter(f"{text!r}; allowed: {word} {'above' if above else 'from'} {least:g}")
        return values

    return parse


def tokens_option(meaning: str, least: int = 0) -> Callable[[_F], _F]:
    """Add a required `--tokens` that takes several counts from `least` on."""
    return click.option(
        "--tokens", callback=number_list(int, least, above=False), required=True, metavar="N[,N...]", help=meaning
    )


def _numeric_option(option: Field[Any]) -> Callable[[_F], _F]:
    flag, word = option.name.replace("_", "-"), option.metadata["words"][option.default] or "off"
    what = f"The {option.name} of the calls.  [default: {word}]"
    return click.option(f"--{flag}/--no-{flag}", default=option.default, help=what)


#: A flag for each numeric option; the command gets them as one value, `numerics`.
numerics_options = gathered(
    [_numeric_option(option) for option in fields(Numerics)],
    "numerics",
    Numerics,
    [option.name for option in fields(Numerics)],
)


def variant_option(meaning: str, default: str | None = AUTO) -> Callable[[_F], _F]:
    """Add `--variant`, the name of one or `auto`."""
    choice = click.Choice(VARIANT_CHOICES)
    return click.option("--variant", default=default, show_default=True, type=choice, help=meaning)


def variants_option(meaning: str, names: Sequence[str] = VARIANT_CHOICES) -> Callable[[_F], _F]:
    """Add `--variant`, which may be given more than once; the command gets `variants`."""
    return click.option("--variant", "variants", multiple=True, type=click.Choice(names), help=meaning)
