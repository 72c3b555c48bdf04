"""The GPU's side of the contract: loading and launching a kernel, its parameter block, tensor maps, sections of the
buffer, halves of the L2, and the record that a kernel leaves when it gives up.

It must not know of torch's tensors: addresses and sizes come in as numbers.
"""
