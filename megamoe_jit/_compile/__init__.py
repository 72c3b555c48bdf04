"""From a kernel's spec to a binary: rendering the sources, finding NVRTC, compiling with it, reading what came out.

It must not know where binaries are kept nor that there are devices: the same spec gives the same text on every machine,
and nothing here asks for a GPU.
"""
