"""Train a captioner from an experiment file (the same as ``captioner train``)."""

from captioner.commands.train import main

if __name__ == "__main__":
    raise SystemExit(main())
