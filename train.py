"""Train a model from one TOML file: python train.py toml/demo.toml"""

import sys

from musubi_tuner.runner.command import main

if __name__ == "__main__":
    sys.exit(main())
