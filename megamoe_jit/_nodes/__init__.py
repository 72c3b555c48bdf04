"""A layer whose experts live on several nodes: rows travel between nodes by an engine that exists, torch.distributed
first of all, and each node runs its own kernel on what has arrived.

What it asks of the layer are buffers and launches of one node. It must not know how a kernel works, nor what a network
is made of: whoever moves rows stands behind `Exchange`.
"""
