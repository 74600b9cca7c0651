"""Caption images and folders of them (the same as ``captioner caption``)."""

from captioner.commands.caption import main

if __name__ == "__main__":
    raise SystemExit(main())
