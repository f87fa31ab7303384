"""The model families by name. A new one is one file and one line here.

The marks of single checkpoints are looked for in this order: SD1.5's is in every SDXL, too.
"""

from dgpo_core.policy.flux import Flux
from dgpo_core.policy.pipeline import DiffusersPolicy
from dgpo_core.policy.sd3 import SD3
from dgpo_core.policy.sd15 import SD15
from dgpo_core.policy.sdxl import SDXL

FAMILIES: dict[str, type[DiffusersPolicy]] = {
    "flux": Flux,
    "sd3": SD3,
    "sdxl": SDXL,
    "sd15": SD15,
}
