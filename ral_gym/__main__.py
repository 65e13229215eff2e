"""``python -m ral_gym``: the same as ``ral-gym``."""

import sys

from ral_gym.commands.cli import main

sys.exit(main())
