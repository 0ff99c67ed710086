"""`python -m ringlm` is the `ringlm` command."""

import sys

from ringlm.frontend.cli import main

if __name__ == "__main__":
    sys.exit(main())
