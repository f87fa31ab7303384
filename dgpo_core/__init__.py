"""DGPO: reinforcement learning of diffusion models by Direct Group Preference Optimization (arXiv 2510.08425).

Importing this package imports nothing heavy; the rooms are its modules.
"""

import os
import sys

from dgpo_core.common.threads import wait_briefly

__version__ = "0.1.0"

wait_briefly(sys.orig_argv, os.environ)
