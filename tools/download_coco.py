"""Fetch COCO images, captions and the Karpathy split; see ``--help``."""

from captioner.commands.download import main

if __name__ == "__main__":
    raise SystemExit(main())
