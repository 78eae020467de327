"""Train a model: ``python train_acc.py [GROUP=CHOICE] [KEY=VALUE]``; see ``--help``.

Nothing heavy is imported before the configuration has been composed.
"""

import sys

from zigflow.cli import train

if __name__ == "__main__":
    sys.exit(train())
