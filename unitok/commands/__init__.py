"""What each `unitok` command does; the arguments are in `unitok.cli`."""
