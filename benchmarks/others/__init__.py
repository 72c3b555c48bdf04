"""Other kernels that multiply MXFP4 weights on Hopper, beside this layer; what each needs is said in its module."""
