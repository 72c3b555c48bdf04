"""The life of a kernel in this process, up to the binary: which entry a spec means, compiling where there is none,
sealing, remembering failures, and packs, which carry kernels to where no compiler is.

It must not know of devices: nothing here is loaded or launched.
"""
