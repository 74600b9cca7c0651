"""Score captions against references: see ``--help``."""

from captioner.commands.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
