"""Check captions of the rendered scenes against what the pictures show; see ``--help``."""

from captioner.commands.check_shapes import main

if __name__ == "__main__":
    raise SystemExit(main())
