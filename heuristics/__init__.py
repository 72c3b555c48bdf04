"""Which kernel runs a call, and the model shapes known by name: pure functions and data, without torch."""

from megamoe_jit.heuristics.presets import Preset, parse_shapes, preset, preset_names
from megamoe_jit.heuristics.select import Choice, all_variants, choose

__all__ = ["Choice", "Preset", "all_variants", "choose", "parse_shapes", "preset", "preset_names"]
