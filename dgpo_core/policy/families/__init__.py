"""The model families by name. A new one is one file and one line here.

Its file holds a class on `DiffusersPolicy`: what `policy.family.Family` asks for, and how its pipeline encodes a prompt
and its network is called. The marks of single checkpoints are looked for in this order: SD1.5's is in every SDXL, too,
and Flux's in FLUX.2 and Chroma.
"""

from dgpo_core.policy.families.chroma import Chroma
from dgpo_core.policy.families.flux import Flux
from dgpo_core.policy.families.flux2 import Flux2
from dgpo_core.policy.families.hidream import HiDream
from dgpo_core.policy.families.kontext import Kontext
from dgpo_core.policy.families.qwenedit import QwenImageEdit
from dgpo_core.policy.families.qwenimage import QwenImage
from dgpo_core.policy.families.sana import Sana
from dgpo_core.policy.families.sd3 import SD3
from dgpo_core.policy.families.sd15 import SD15
from dgpo_core.policy.families.sdxl import SDXL
from dgpo_core.policy.families.wan import Wan
from dgpo_core.policy.families.zimage import ZImage
from dgpo_core.policy.pipeline import DiffusersPolicy

FAMILIES: dict[str, type[DiffusersPolicy]] = {
    "chroma": Chroma,
    "flux2": Flux2,
    "flux": Flux,
    "kontext": Kontext,
    "qwen-image-edit": QwenImageEdit,
    "qwenimage": QwenImage,
    "zimage": ZImage,
    "sana": Sana,
    "hidream": HiDream,
    "wan": Wan,
    "sd3": SD3,
    "sdxl": SDXL,
    "sd15": SD15,
}
