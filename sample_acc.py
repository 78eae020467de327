"""Sample from a checkpoint and judge the result: ``python sample_acc.py ckpt=RUN_DIR``; see ``--help``.

Nothing heavy is imported before the configuration has been composed.
"""

import sys

from zigflow.cli import sample

if __name__ == "__main__":
    sys.exit(sample())
