"""The methods that DGPO is compared with, each in a file with its equations."""

from collections.abc import Mapping

from dgpo_core.benchmark.methods.awm import AWM
from dgpo_core.benchmark.methods.dgpo import DGPO
from dgpo_core.benchmark.methods.flow_awr import FlowAWR
from dgpo_core.benchmark.methods.flow_grpo import FlowGRPO, FlowGRPOFast
from dgpo_core.benchmark.methods.nft import DiffusionNFT
from dgpo_core.benchmark.methods.rival import Rival
from dgpo_core.benchmark.methods.v_grpo import VGRPO

METHODS: Mapping[str, type[DGPO] | type[Rival]] = {
    "dgpo": DGPO,
    "nft": DiffusionNFT,
    "awm": AWM,
    "v_grpo": VGRPO,
    "flow_awr": FlowAWR,
    "flow_grpo_fast": FlowGRPOFast,
    "flow_grpo": FlowGRPO,
}
"""By the name that the command knows them by."""
