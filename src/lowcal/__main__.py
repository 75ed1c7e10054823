"""`python -m lowcal` is the command `lowcal`."""

import sys

from lowcal.cli import main

sys.exit(main())
