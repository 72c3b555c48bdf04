"""Whether the layer is right: the table of scenarios, and running it against the reference on one rank or several.

It must not know of clocks: how fast the layer is belongs to `_bench`.
"""
