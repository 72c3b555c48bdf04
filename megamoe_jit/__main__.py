"""`python -m megamoe_jit` is the same as `megamoe-jit`."""

from megamoe_jit._cli import main

if __name__ == "__main__":
    main()
