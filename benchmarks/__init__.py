"""The laboratory: what other kernels need, goals, results, and what is made of them.

It imports the package, and the package nothing of it: what a user of a wheel has is in `megamoe_jit/_bench`.
"""
