"""The model families by name. A new one is one file and one line here.

Its file holds a class on `DiffusersPolicy`: what `policy.family.Family` asks for, and how its pipeline encodes a prompt
and its network is called. The marks of single checkpoints are looked for in this order: SD1.5's is in every SDXL, too.
"""

from dgpo_core.policy.families.flux import Flux
from dgpo_core.policy.families.sd3 import SD3
from dgpo_core.policy.families.sd15 import SD15
from dgpo_core.policy.families.sdxl import SDXL
from dgpo_core.policy.pipeline import DiffusersPolicy

FAMILIES: dict[str, type[DiffusersPolicy]] = {
    "flux": Flux,
    "sd3": SD3,
    "sdxl": SDXL,
    "sd15": SD15,
}
