"""Prompts for the reward `ocr`: short texts of a stated length, on things that carry writing."""

import functools
import random
from collections.abc import Callable, Hashable

from dgpo_core.common.errors import UserError
from dgpo_core.common.prompts import Prompt
from dgpo_core.rewards.ocr.text import normal, wanted_texts

SHORTEST, LONGEST = 3, 60
"""Letters of a text, spaces aside."""
TRIES = 2000
"""In a row without a new prompt, after which there are taken to be no more."""

# fmt: off
FIRST = (
    "big", "blue", "bold", "brave", "bright", "busy", "calm", "clean", "clever", "cold", "cosy", "crisp", "daily",
    "deep", "distant", "early", "easy", "endless", "fair", "famous", "fast", "fine", "first", "free", "fresh", "gentle",
    "giant", "golden", "good", "grand", "great", "green", "happy", "hidden", "honest", "hot", "humble", "icy", "jolly",
    "kind", "last", "late", "little", "lively", "local", "lost", "lucky", "mellow", "merry", "mighty", "modern", "new",
    "nimble", "noble", "northern", "old", "open", "patient", "perfect", "plain", "proud", "pure", "quick", "quiet",
    "rapid", "rare", "red", "royal", "rustic", "secret", "sharp", "silent", "silver", "simple", "slow", "small",
    "smooth", "soft", "solid", "southern", "special", "steady", "strong", "summer", "sunny", "sweet", "tiny", "true",
    "urban", "vivid", "warm", "western", "whole", "wild", "winter", "wise", "wonderful", "young",
)
THEN = (
    "adventure", "air", "apple", "arcade", "art", "atlas", "autumn", "bakery", "balance", "bay", "beach", "bicycle",
    "book", "bread", "breeze", "bridge", "butter", "cabin", "cafe", "camp", "candle", "canyon", "castle", "cedar",
    "chance", "cheese", "chocolate", "cinema", "circle", "city", "clinic", "cloud", "club", "coast", "coffee", "comet",
    "compass", "cookie", "copper", "corner", "cottage", "day", "deal", "desert", "diner", "dinner", "dream", "echo",
    "energy", "engine", "evening", "exit", "express", "farm", "festival", "fig", "fire", "fish", "flower", "forest",
    "fox", "future", "galaxy", "garage", "garden", "gate", "ginger", "glass", "grocery", "harbour", "harvest", "hat",
    "hiking", "history", "holiday", "home", "honey", "horizon", "hotel", "house", "ice", "idea", "ink", "island", "jam",
    "journey", "juice", "jungle", "key", "kitchen", "lake", "lantern", "laundry", "legend", "lemon", "library",
    "lighthouse", "lunch", "magic", "map", "maple", "market", "meadow", "melody", "memory", "midnight", "mill", "mint",
    "moment", "moon", "morning", "mountain", "museum", "music", "night", "noodles", "north", "notebook", "oak", "oasis",
    "ocean", "office", "olive", "orbit", "orchard", "paper", "parade", "park", "peach", "pepper", "piano", "picnic",
    "pie", "pine", "planet", "pocket", "poetry", "pottery", "puzzle", "question", "radio", "rain", "recipe", "records",
    "river", "road", "robot", "rocket", "roof", "saddle", "sale", "salt", "science", "sea", "season", "sky", "snow",
    "soup", "spice", "spring", "stadium", "star", "station", "stone", "storm", "story", "street", "studio", "sugar",
    "summit", "sun", "sunrise", "surprise", "tailor", "tea", "theatre", "thunder", "ticket", "timber", "tower", "toys",
    "traffic", "train", "travel", "treasure", "valley", "victory", "village", "voyage", "water", "wave", "weekend",
    "willow", "wind", "window", "wonder", "wood", "workshop", "yoga", "zoo",
)
CARRIERS = (
    "a wooden sign above a shop door", "a neon sign on a brick wall", "a chalkboard in front of a cafe", "a road sign",
    "a paper coffee cup", "a birthday cake with icing", "the cover of an old book", "a vintage travel poster",
    "a white T-shirt on a hanger", "a street mural", "a billboard beside a motorway", "a museum label", "a name tag",
    "a jar of jam with a label", "the side of a delivery van", "a shop window", "a stone over an archway",
    "a cardboard box", "a concert ticket", "a newspaper headline", "a laptop screen", "a phone screen",
    "a tram's destination display", "a knitted scarf", "a brass plaque", "a flag on a mast", "a market stall's banner",
    "a door mat", "a coffee mug on a desk", "a school notebook", "a sandy beach, written with a stick",
    "a frosted window, written with a finger", "a postage stamp", "a wine bottle", "a baseball cap",
    "a skateboard deck", "a hot air balloon", "a robot's chest", "a subway wall of tiles", "a film poster",
)
PLACES = (
    "in the rain", "at night", "at sunrise", "in warm evening light", "on a foggy morning", "in bright sunlight",
    "under a street lamp", "in a busy street", "in a quiet village", "seen from close by", "seen from the side",
    "in a studio, against a plain background", "as a photograph", "as a watercolour", "as a pencil drawing",
    "as a comic panel", "in winter, with snow around it", "among autumn leaves", "beside a window",
    "with people passing",
)
VERBS = ("that says", "that reads", "with the words", "showing the text", "with the writing")
# fmt: on


def draw(count: int, letters: tuple[int, int], rng: random.Random, free: Callable[[Prompt], bool]) -> list[Prompt]:
    """`count` different prompts that are `free`, with texts of `letters` (lowest, highest; all equally likely).

    Raises UserError where the lengths cannot be had, or where there are fewer.
    """
    low, high = letters
    if not SHORTEST <= low <= high <= LONGEST:
        raise UserError(
            f"--letters must be two whole numbers, {SHORTEST} to {LONGEST}, the lower one first, not {low} {high}."
        )
    chosen: dict[str, Prompt] = {}
    tries = 0
    while len(chosen) < count:
        prompt = _prompt(rng, low, high)
        tries += 1
        if prompt.text not in chosen and free(prompt):
            chosen[prompt.text], tries = prompt, 0
        if tries == TRIES:
            raise UserError(
                f"There are only about {len(chosen):,} different prompts with texts of {low} to {high} letters to"
                f" choose from, not {count:,}: ask for fewer, or for other lengths."
            )
    return list(chosen.values())


def _prompt(rng: random.Random, low: int, high: int) -> Prompt:
    text = _text(rng, rng.randint(low, high))
    written = text.upper() if rng.random() < 0.2 else text
    words = f'{rng.choice(CARRIERS)} {rng.choice(VERBS)} "{written}", {rng.choice(PLACES)}'
    return Prompt(words, {"text": written})


def _text(rng: random.Random, length: int) -> str:
    """Of `length` letters: one phrase, or several with "and" between them."""
    phrases = _phrases()
    whole = length in phrases and rng.random() < 0.75
    ways = [n for n in phrases if length - n - len("and") >= SHORTEST]
    if whole or not ways:
        return rng.choice(phrases[length])
    first = rng.choice(ways)
    return f"{rng.choice(phrases[first])} and {_text(rng, length - first - len('and'))}"


@functools.cache
def _phrases() -> dict[int, list[str]]:
    """One or two words, by their letters: SHORTEST and every length from there to the longest."""
    by_length: dict[int, list[str]] = {}
    for phrase in [*THEN, *(f"{first} {then}" for first in FIRST for then in THEN)]:
        by_length.setdefault(len(phrase.replace(" ", "")), []).append(phrase.title())
    return dict(sorted(by_length.items()))


def meaning(prompt: Prompt) -> Hashable:
    """Equal for prompts that ask for the same texts; None where a prompt asks for none."""
    try:
        return tuple(sorted(map(normal, wanted_texts(prompt.text, prompt.metadata))))
    except UserError:
        return None
