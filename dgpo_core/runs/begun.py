"""What a run was begun with besides its settings, which only name it: a resumed run must be given the same.

Prompt files may be edited on the way, which is told. Ratings that are trained on and a taste may not: what was learned
before would be about something else than what follows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgpo_core.common.digest import digest_of
from dgpo_core.common.errors import UserError
from dgpo_core.common.reading import shown
from dgpo_core.people.gallery import Gallery
from dgpo_core.rewards import Reward
from dgpo_core.rewards.taste.reward import TasteReward
from dgpo_core.settings.config import TASTE, Config


@dataclass(frozen=True)
class Begun:
    """Digests. ratings: of the rated groups that are trained on; taste: of the one that scores; "" for none."""

    ratings: str = ""
    taste: str = ""

    @staticmethod
    def with_(gallery: Gallery | None, judges: Mapping[str, Reward]) -> "Begun":
        """By what was read, not by the files, which may have changed since. judges: the rewards by name."""
        reward = judges.get(TASTE)
        taste = reward.taste if isinstance(reward, TasteReward) else None
        known = digest_of({"weights": taste.weights, "centre": taste.centre}) if taste else ""
        return Begun(gallery.digest if gallery else "", known)

    def info(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"ratings": self.ratings, "taste": self.taste}

    def require(self, info: Mapping[str, Any], config: Config) -> None:
        """Raises UserError where a checkpoint's info tells of others. One of before tastes were noted is taken."""
        anew = "start a new run, which can go on from this one's LoRA with --lora.init."
        if info.get("ratings", "") != self.ratings:
            raise UserError(f"The ratings in {config.groups} are not those that the run began with: {anew}")
        if info.get("taste", self.taste) != self.taste:
            named = next((term.options for term in (*config.reward, *config.watch) if term.name == TASTE), {})
            file = shown(named.get("path") or named.get("name", ""), 1000)
            raise UserError(
                f"The taste {file} is not the one that the run began with; it was fitted anew since: give the file as"
                f" it was, or {anew}"
            )
