"""How good adapters are by kind of prompt: the "tag" of their metadata, as GenEval's prompts have it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dgpo_core.common.prompts import Prompt
from dgpo_core.evaluation.scores import Evaluation, Measurement


def tags_of(prompts: Sequence[Prompt]) -> list[str]:
    """The tag of each prompt; none at all where a prompt has no tag, or all have the same."""
    tags = [str(prompt.metadata.get("tag") or "") for prompt in prompts]
    return tags if all(tags) and len(set(tags)) > 1 else []


@dataclass(frozen=True)
class ByTag:
    """Models under one reward. means: by label and tag, over the images of that tag's prompts."""

    means: Mapping[str, Mapping[str, Measurement]]

    @staticmethod
    def of(rows: Mapping[str, Evaluation], weights: Mapping[str, float], tags: Sequence[str]) -> "ByTag":
        """From evaluations by label and the tag of each prompt; without tags there is nothing in it."""
        return ByTag({label: _means(one, weights, tags) for label, one in rows.items()} if tags else {})

    def as_json(self, label: str) -> dict[str, object]:
        """What an entry of a model has besides."""
        means = self.means.get(label)
        return {"tags": {tag: one.as_json() for tag, one in means.items()}} if means else {}

    def cells(self, written: Callable[[str], str]) -> list[list[str]]:
        """A head and a line for each model, with the mean of the tags' means last, as GenEval sums up; empty without
        tags. written: how labels and tags, which are from outside, are put down."""
        if not self.means:
            return []
        lines = [["", *map(written, next(iter(self.means.values()))), "mean of these"]]
        for label, means in self.means.items():
            values = [one.mean for one in means.values()]
            lines.append([written(label), *(f"{value:.3f}" for value in (*values, sum(values) / len(values)))])
        return lines


def _means(evaluation: Evaluation, weights: Mapping[str, float], tags: Sequence[str]) -> dict[str, Measurement]:
    scores = evaluation.total(weights)
    owners = [tags[prompt] for prompt in evaluation.places[:, 0].tolist()]
    places = {tag: [i for i, owner in enumerate(owners) if owner == tag] for tag in dict.fromkeys(owners)}
    return {tag: Measurement.of(scores[found]) for tag, found in places.items()}
