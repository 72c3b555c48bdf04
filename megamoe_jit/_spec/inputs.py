"""`Inputs`: where a launch of the layer's kernel has its inputs from."""

from __future__ import annotations

from enum import StrEnum

from megamoe_jit._errors import ConfigError
from megamoe_jit._text import shown


class Inputs(StrEnum):
    """Where the inputs of a launch come from; `Inputs` in `kernels_src/base/constants.cuh`."""

    STAGED = "staged"  #: from the buffer, staged by earlier work of the stream
    RAW = "raw"  #: from tensors of the caller, bf16; the launch stages them itself

    @classmethod
    def parse(cls, text: str) -> Inputs:
        """The one named `text`; raises `ConfigError` with the names there are."""
        for inputs in cls:
            if isinstance(text, str) and text == inputs.value:
                return inputs
        raise ConfigError(f"unknown inputs {shown(text)}; allowed: {', '.join(cls)}")
