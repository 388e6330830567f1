"""`python -m unitok`: the same as the `unitok` command."""

import sys

from unitok.cli import main

sys.exit(main())
