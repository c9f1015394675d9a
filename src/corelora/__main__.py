"""`python -m corelora`: the same as the command `corelora`."""

import sys

from corelora.cli import main

if __name__ == "__main__":
    sys.exit(main())
