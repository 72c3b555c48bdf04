"""The layer as an experts implementation of transformers: `import megamoe_jit.transformers`, then
`from_pretrained(..., experts_implementation="megamoe")`, or `model.set_experts_implementation("megamoe")`.

This room knows modules of transformers and what their weights are called. It must not know of files, nor of other
engines; a release of transformers that it does not fit gets one warning and stays as it is.
"""

from __future__ import annotations

from megamoe_jit.transformers.adapter import Options, options
from megamoe_jit.transformers.register import prepare, register, release

__all__ = ["Options", "options", "prepare", "registered", "release"]

registered = register()  #: whether transformers knows the implementation now
