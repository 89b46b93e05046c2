"""``python -m musubi_tuner.runner``: the same as `train.py`, from anywhere."""

import sys

from musubi_tuner.runner.command import main

if __name__ == "__main__":
    sys.exit(main())
