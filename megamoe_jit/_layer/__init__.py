"""The layer as callers see it: quantised weights and activations, buffers, groups of ranks, the checked calls,
`MegaMoE`.

Here arguments are checked, once; everything below trusts them. It must not know how it is tested, timed or explained.
"""
