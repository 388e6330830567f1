"""The `unitok` command, also as `python -m unitok`."""

import sys


def main() -> int:
    """Run one command; returns the exit code."""
    try:
        from unitok.cli import main as run
    except KeyboardInterrupt:  # Ctrl-C while we begin
        print("unitok: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
