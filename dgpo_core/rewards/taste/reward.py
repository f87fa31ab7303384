"""The reward `taste`: what somebody would say of a picture, by a model fitted to what they said of others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from dgpo_core.common.errors import UserError
from dgpo_core.common.files import check_folder_name
from dgpo_core.common.pictures import to_pil
from dgpo_core.common.reading import kind_at, shown
from dgpo_core.rewards import weight_files
from dgpo_core.rewards.model import ModelReward
from dgpo_core.rewards.taste.features import CLIP, features
from dgpo_core.rewards.taste.model import Taste, digest_of
from dgpo_core.rewards.weight_files import Weights


class TasteReward(ModelReward):
    """How much better than a middling picture, in units of the logit: 1 more wins in 73 % of pairs.

    path: the taste's file; name: or what it is called in the folder of reward models (`models/reward_models`). digest:
    of the file that is meant (`digest_of`), "" for whichever is there. clip: folder or hub id of CLIP, where the taste
    was fitted on its features. dtype, batch: see `ModelReward`. A file whose
    held-out agreement's interval reaches down to chance is refused.
    """

    shareable: ClassVar[tuple[str, ...]] = ("name", "digest", *ModelReward.shareable)

    def __init__(
        self,
        device: str = "cpu",
        path: str = "",
        name: str = "",
        digest: str = "",
        clip: str = "",
        dtype: str = "auto",
        batch: int = 64,
    ) -> None:
        super().__init__(device, dtype, batch)
        self.taste = served(path, name)
        if digest and digest != digest_of(taste_file(path, name)):
            raise UserError(f"The taste {shown(path or name)} was fitted anew meanwhile: press Run again.")
        self.features = features(self.taste.kind, clip, self.dtype)
        if self.features.width != len(self.taste.weights):
            raise UserError(
                f"The taste {shown(path or name)} was fitted on {len(self.taste.weights)} features, and here are"
                f" {self.features.width}: name the CLIP that it was fitted on, or fit it anew."
            )

    @classmethod
    def sources(cls, options: Mapping[str, Any]) -> list[tuple[Weights, Any]]:
        """CLIP where the taste was fitted on it."""
        taste = served(options.get("path", ""), options.get("name", ""))
        return [(CLIP, options.get(CLIP.option, ""))] if taste.kind == "clip" else []

    def networks(self) -> Sequence[nn.Module]:
        return self.features.networks()

    def score_batch(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.taste.scores(self.features.of([to_pil(image) for image in images], prompts))


def served(path: str, name: str) -> Taste:
    """The taste of a file, checked. Raises UserError where there is none, or it is no better than chance."""
    taste = Taste.load(taste_file(path, name))
    if not taste.agreement.above_chance:
        raise UserError(
            f"The taste {shown(path or name, 1000)} agrees with {taste.agreement} that it had not seen"
            f" ({taste.agreement.groups} groups), which may be chance: it is served once the interval is above 50 %."
            " Rate more groups and fit it anew."
        )
    return taste


def taste_file(path: str, name: str) -> Path:
    """Where a taste is. Raises UserError where it is not there, and for a name that is no file's own."""
    if path:
        found = Path(path)
        if kind_at(found, "The taste") != "file":
            raise UserError(f"There is no taste {shown(path, 1000)}: python -m dgpo_core.people.taste makes one.")
        return found
    if not isinstance(name, str) or not name:
        raise UserError("The reward taste needs a file: taste=FILE, made by python -m dgpo_core.people.taste.")
    check_folder_name(name, "name of a taste")
    found_in = weight_files.in_folders(name if name.endswith(".safetensors") else f"{name}.safetensors")
    if found_in is None:
        raise UserError(f"There is no taste {shown(name)} in the folder of reward models: make it with the node Taste.")
    return found_in
