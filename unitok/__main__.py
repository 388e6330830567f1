"""`python -m unitok`: the same as the `unitok` command."""

import sys

try:
    from unitok.cli import main
except KeyboardInterrupt:  # Ctrl-C while we begin
    print("unitok: interrupted", file=sys.stderr)
    sys.exit(130)

sys.exit(main())
