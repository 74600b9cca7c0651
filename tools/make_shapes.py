"""Draw the data set of rendered scenes; see ``--help``."""

from captioner.commands.shapes import main

if __name__ == "__main__":
    raise SystemExit(main())
