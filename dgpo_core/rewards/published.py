"""CLIP models that are published as one file, too: where they are to be had, and what they are called in a folder."""

from dgpo_core.rewards.weight_files import Weights, is_here

CLIP_WORDS = "clip_tokenizer"
"""What a program may `supply`: the folder of CLIP's tokenizer, the same for OpenAI's models and LAION's."""

CLIP_L = Weights("openai/clip-vit-large-patch14", "1.7 GB", option="clip", also=("clip-vit-large-patch14.safetensors",))
CLIP_L_WORDS = Weights(CLIP_L.repository, "its tokenizer, 4 MB", supplied=CLIP_WORDS)
PICKSCORE = Weights("yuvalkirstain/PickScore_v1", "3.9 GB", also=("PickScore_v1.safetensors",))
PICKSCORE_WORDS = Weights(
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "its tokenizer, 4 MB", option="processor", supplied=CLIP_WORDS
)

ONE_FILE = (PICKSCORE, CLIP_L)


def names_here() -> list[str]:
    """The files' names of those that are here in any form: as such a file, as a folder, or in the Hugging Face cache.

    Each of them means, wherever it is chosen, what would be taken without a choice.
    """
    return [name for weights in ONE_FILE if is_here(weights) for name in weights.also]
