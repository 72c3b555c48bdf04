"""What `--shapes` names: shapes that are known, files of them, and models by their configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megamoe_jit._cli._io import say
from megamoe_jit._spec.formats import FP8

if TYPE_CHECKING:
    from megamoe_jit.heuristics.presets import Preset

__all__ = ["named_shapes"]


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
