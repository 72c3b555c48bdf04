"""`python -m megamoe_jit` is the same as `megamoe-jit`."""

import sys

if __name__ == "__main__":
    try:
        from megamoe_jit._cli import main

        main()
    except KeyboardInterrupt:  # while modules are imported; afterwards `main` answers
        sys.exit(130)
