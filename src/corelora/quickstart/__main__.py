"""`python -m corelora.quickstart recipes/quickstart.yaml`."""

import sys

from corelora.quickstart.run import main

sys.exit(main())
