"""Every setting of a run, once: type, default, allowed range and documentation.

The line under a field is its help on the command line (`python -m dgpo_core.train --help`). The `Annotated` range is
what `validate` enforces. Defaults suit SD3.5-M in mode 1 (roll-outs with CFG, training without) on a 12 GB card; they
are the paper's or the official config's unless the line says otherwise. The files in `presets/` override.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

EMBEDDED = "embedded"
"""Instead of a path: what ships inside the package (the demo model, its training and its held-out prompts)."""

DEMO_REWARDS = ("shapes", "shapes_graded")
"""Rewards that read the pictures of the embedded model, and no others."""

STATISTICS = ("edge_density", "entropy", "saturation", "group_diversity")
"""What every evaluation watches besides `watch`: statistics that cost next to nothing and show most hacks first."""

NEUTRAL = (*STATISTICS, "jpeg_size", "brightness")
"""Rewards of which more is neither better nor worse."""

AUTO: Final = "auto"
"""Left open: chosen from the card's free memory before a run; what the properties below say, where none is known."""

NO_TRACKER: Final = "none"
"""Metrics stay in the run folder alone."""

HUMAN, RATINGS = "human", "ratings"
TASTE = "taste"
"""The reward that a file of somebody's taste gives, written taste=FILE."""
PEOPLE = (HUMAN, RATINGS)
"""Rewards that are what people say, asked during the run or read from a folder: no image can be measured by them."""


@dataclass(frozen=True)
class Range:
    """The allowed values of a number (or of each number of a tuple): `low <= x <= high`, or `low < x` if `open_low`,
    `x < high` if `open_high`."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is allowed; NaN and the infinities never are."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below and abs(value) != float("inf")

    def __str__(self) -> str:
        low = f"{'greater than' if self.open_low else 'at least'} {show_number(self.low)}"
        high = f"{'less than' if self.open_high else 'at most'} {show_number(self.high)}"
        return " and ".join(text for text, edge in ((low, self.low), (high, self.high)) if abs(edge) != float("inf"))


def show_number(value: float) -> str:
    """A number for a sentence, also one that is too large for a float."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**25 else f"a number of {len(str(abs(value)))} digits"
    return f"{value:g}"


# What is above these is a slip of the hand, and would end in a crash or in nothing happening for years.
MOST_SEED, MOST_ITERATIONS = 2**64 - 1, 1_000_000
MOST_FEW_STEPS = 16
"""A model that is made for more steps is no few-step model."""
Count = Annotated[int, Range(1, 1_000_000)]
CountOrZero = Annotated[int, Range(0, 1_000_000)]
OpenCount = Count | Literal["auto"]
OpenCountOrZero = CountOrZero | Literal["auto"]
Switch = bool | Literal["auto"]
Kept = Literal["auto", "none", "fp8", "int8", "nf4"]
Pixels = Annotated[int, Range(0, 16_384)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]
Guidance = Annotated[float, Range(1, 100)]


@dataclass(frozen=True)
class ModelConfig:
    """The diffusion model that is trained."""

    path: str = EMBEDDED
    """A diffusers folder, a hub id, or a .safetensors or .gguf file; 'embedded' and 'embedded-editor' ship."""
    family: str = "auto"
    """Architecture: sd15, sdxl, sd3, flux, kontext, qwen-image-edit and others; 'auto' reads it from the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the frozen base; 'auto' is bfloat16 on a GPU and float32 on a CPU. The LoRA's own
    numbers are float32 always; its products are computed in the base's type."""
    height: Pixels = 0
    """Image height in pixels, at most 16384; 0 is the model's own."""
    width: Pixels = 0
    """Image width in pixels, at most 16384; 0 is the model's own."""
    device: str = "auto"
    """Where to run: cpu, cuda, cuda:1, mps; 'auto' takes the first accelerator there is."""
    prediction: Literal["auto", "epsilon", "v", "flow"] = "auto"
    """What the model predicts (noise, v, a flow's velocity); 'auto' finds it from its keys, header and scheduler."""
    quantize: Kept = AUTO
    """How the frozen base's large layers are kept: 'fp8' and 'int8' take one byte a weight, 'nf4' (with the package
    bitsandbytes) half of one; they are made whole where they are used, and the LoRA trains as ever. 'auto' is 'none',
    but on a GPU where the base does not fit so."""
    quantize_text: Literal["none", "fp8", "int8", "nf4"] = "none"
    """The same of the text encoders, of which T5 is 9.1 GiB in bfloat16."""
    distilled: str = "auto"
    """Whether the model was distilled to draw in a few steps (schnell, Turbo, Lightning, LCM, DMD, Hyper): 'no', or the
    number of steps; 'auto' reads it from its names, header and scheduler."""
    few_step_lora: str = ""
    """A LoRA file that makes the model draw in a few steps (a Lightning, LCM or Hyper LoRA), merged into the frozen
    base; 'embedded' is the demo model's."""

    @property
    def kept_as(self) -> Kept:
        """`quantize`; where it is open, none."""
        return "none" if self.quantize == AUTO else self.quantize


@dataclass(frozen=True)
class LoraConfig:
    """The adapter that learns."""

    rank: Annotated[int, Range(1, 4096)] = 32
    """Rank of the LoRA matrices (paper 32, official code 64), 1 to 4096."""
    alpha: Positive = 64.0
    """LoRA scale numerator: the update is multiplied by alpha / rank (official code: 2 * rank), above 0."""
    dropout: BelowOne = 0.0
    """Dropout on the LoRA input while training, 0 to below 1."""
    targets: tuple[str, ...] = ()
    """Suffixes of the module names that get a LoRA; none given = the family's default (all attention projections)."""
    init: str = ""
    """A LoRA file (.safetensors) to continue from; empty starts from a fresh one."""


@dataclass(frozen=True)
class DataConfig:
    """The prompts."""

    prompts: str = EMBEDDED
    """Training prompts: a .txt (one per line) or .jsonl ({"prompt": ..., metadata}) file, in which
    "image" is the path of the picture that a model edits; 'embedded' and 'embedded-edits' ship;
    python -m dgpo_core.prompts writes some for the rewards geneval and ocr."""
    held_out: str = EMBEDDED
    """Prompts for evaluation, disjoint from the training prompts, same formats; empty: no evaluation on any."""
    text: str = ""
    """The training prompts themselves, one per line; where given, no file is read."""
    held_out_text: str = ""
    """The prompts for evaluation themselves, one per line; where given, no file is read."""
    order_seed: Annotated[int, Range(-1, MOST_SEED)] = -1
    """Seed of the order in which prompts are taken; -1 takes the run's seed."""
    wildcards: Annotated[int, Range(0, 1000)] = 0
    """Texts that are drawn of each prompt with {red|blue} or __colour__ in it, up to 1000; 0 takes these as words."""
    wildcard_seed: Annotated[int, Range(0, MOST_SEED)] = 0
    """Seed of what is drawn."""
    wildcard_folder: str = "wildcards"
    """Folder of the files that __names__ stand for, such as colour.txt: one choice a line."""
    groups_per_iteration: Annotated[int, Range(1, 1000)] = 8
    """Prompts (= groups, the paper's P) per iteration over all processes, 1 to 1000 (paper 8, '24 is better')."""
    pass_over: Annotated[int, Range(0, 1000)] = 0
    """How often a prompt whose last group had equal rewards, so that it taught nothing, is passed over in its turn."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the images of an iteration are drawn."""

    solver: str = "dpmpp_2m"
    """ODE solver: euler, heun, dpmpp_2m, unipc for flow models; ddim, plms, euler, dpmpp_2m, unipc for others."""
    steps: Annotated[int, Range(1, 1000)] = 10
    """Solver steps per image, 1 to 1000."""
    cfg: Guidance = 4.5
    """Classifier-free guidance scale while drawing, 1 to 100; 1 is no guidance."""
    group_size: Annotated[int, Range(2, 10_000)] = 24
    """Images per prompt (the paper's G), 2 to 10000: the update compares the images of a group with each other."""
    batch: OpenCountOrZero = AUTO
    """Images per forward; bounds memory, does not change the result; 0 draws the whole iteration at once; 'auto' is
    what fits the GPU, and 8 where that is unknown."""
    negative_prompt: str = ""
    """Prompt of the unguided branch where cfg > 1."""
    on_policy_steps: CountOrZero = 200
    """The fast EMA draws instead of the current weights once more than this many steps are done (GenEval: 500)."""
    scheduler: str = ""
    """Noise levels, by the name of one of ComfyUI's schedulers, for native policies; empty: the model's own."""

    @property
    def at_once(self) -> int:
        """`batch`; where it is open, 8."""
        return self.batch if isinstance(self.batch, int) else 8


@dataclass(frozen=True)
class RewardTerm:
    """One reward of the sum."""

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    only_if: str = ""
    """A condition on another reward, such as "ocr > 0.5" (see `advantage.gated`); empty counts for all images."""


@dataclass(frozen=True)
class TrainingConfig:
    """From rewards to weights."""

    advantage_std: Literal["group", "global"] = "group"
    """Divide (reward - group mean) by the standard deviation of the group or of all samples of the iteration."""
    advantage_clamp: Positive = 5.0
    """Advantages are clamped to plus or minus this, above 0."""
    beta: Positive = 100.0
    """Sharpness of the group preference, above 0 (mode 1 and 2a: 10 to 100; mode 2b: 2000 to 5000)."""
    logit_scaling: Literal["official", "paper"] = "official"
    """'paper' keeps the factor beta in the gradient; 'official' drops it, as the authors' code does."""
    clip: NotNegative = 1e-2
    """PPO-style clip of exp(d_old - d) around 1, at least 0; 0 is off (mode 1: 1e-3 to 1e-2, 2: 1e-5 to 1e-4)."""
    kl_weight: NotNegative = 0.02
    """Weight of the mean squared distance to the base model's prediction (the KL term), at least 0."""
    kl_cfg: Guidance = 1.0
    """Guidance scale of the base as a reference, 1 to 100; 1 is none. It guides the KL term and, where the reference is
    frozen, the group preference (mode 2a: 4.5)."""
    reference: Literal["frozen", "old"] = "frozen"
    """What the group preference is measured against: the base model, or the fast EMA of the adapter without guidance
    (mode 2b). The KL term is always with the base."""
    timesteps: Annotated[int, Range(1, 1000)] = 4
    """Noise levels per sample and iteration (the paper's M), 1 to 1000."""
    timestep_source: Literal["rollout", "uniform"] = "rollout"
    """Draw them from the roll-out's own timesteps without replacement, or uniformly from [t_min, 1]."""
    t_min: NotNegative = 7.0
    """Timestep clip: a noise level below 1 under which nothing is trained, or how many first roll-out steps; 0: off."""
    micro_batch: OpenCount = AUTO
    """Samples per training forward; bounds memory and adds up to the same gradient but for rounding, at least 1; 'auto'
    is what fits the GPU, and 4 where that is unknown."""
    lr: Positive = 3e-4
    """Learning rate of AdamW, above 0."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of AdamW, at least 0."""
    betas: Annotated[tuple[float, float], Range(0, 1, open_high=True)] = (0.9, 0.999)
    """Moment decays of AdamW, each 0 to below 1."""
    max_grad_norm: NotNegative = 1.0
    """The gradient is scaled down to this norm, at least 0; 0 switches it off."""
    ema_fast_max: BelowOne = 0.3
    """Largest decay of the fast EMA (the 'old' policy), 0 to below 1."""
    ema_fast_rate: NotNegative = 0.001
    """The fast EMA's decay grows by this per optimiser step until ema_fast_max, at least 0."""
    ema_slow: BelowOne = 0.9
    """Decay of the slow EMA, which is evaluated and saved, 0 to below 1."""
    ema_slow_every: Count = 8
    """Optimiser steps between two updates of the slow EMA, at least 1; before the first it is the current weights."""
    kl_target: NotNegative = 0.0
    """How far from the base model the KL term lets predictions be, as a mean squared distance: beyond it the term's
    weight grows, within it shrinks, down to kl_weight; 0 leaves the weight at kl_weight."""
    norm_guard: NotNegative = 0.0
    """Weight of a hinge on the growth of the prediction's norm over the base's, which goes along with plastic,
    over-saturated pictures, at least 0; 0 is off."""

    @property
    def at_once(self) -> int:
        """`micro_batch`; where it is open, 4."""
        return self.micro_batch if isinstance(self.micro_batch, int) else 4


@dataclass(frozen=True)
class EvalConfig:
    """How the gain is measured, always with seeds that training never uses."""

    every: CountOrZero = 50
    """Iterations between two evaluations on held-out prompts; 0 evaluates only before and after."""
    images: CountOrZero = 64
    """Images per evaluation during the training."""
    final_images: CountOrZero = 512
    """Images of the measurement before and after, for base and adapter each; 0 leaves it out."""
    reward: str = ""
    """What measures the gain (with its options in `watch`); empty: what is trained, without conditions or people."""
    batch: OpenCountOrZero = AUTO
    """Images per forward; bounds memory; 0 draws all at once; 'auto' is what fits the GPU, and 8 where that is
    unknown."""
    solver: str = ""
    """Solver of the evaluation; empty is the roll-out's."""
    steps: Annotated[int, Range(1, 1000)] = 14
    """Solver steps of the evaluation, 1 to 1000 (official config 14, the paper's table 40)."""
    cfg: Guidance = 4.5
    """Guidance scale of the evaluation, 1 to 100; 1 is no guidance."""
    weights: Literal["ema", "current"] = "ema"
    """Evaluate and save the slow EMA of the adapter, or its current weights."""
    on_alarm: Literal["warn", "stop"] = "warn"
    """Where a watched reward falls while the trained one rises: tell, or also stop and save the best adapter so far."""

    @property
    def at_once(self) -> int:
        """`batch`; where it is open, 8."""
        return self.batch if isinstance(self.batch, int) else 8


@dataclass(frozen=True)
class HumanConfig:
    """How you are asked, with `--reward human`."""

    port: Annotated[int, Range(0, 65535)] = 8300
    """Port of the page, which only this machine (and who forwards the port over SSH) can open; 0 takes a free one."""
    mode: Literal["rank", "thumbs", "pairs"] = "rank"
    """Put images in order, best first; mark them as good or bad; or choose the better one of two, pair by pair."""
    pairs: CountOrZero = 0
    """Pairs of each group that mode pairs asks about; 0 takes one and a half times the group's size."""
    taste: bool = False
    """Let a taste that learns from your answers answer the groups that it is sure of."""
    answers: CountOrZero = 60
    """With a taste: ask about so many groups at most, then let it go on alone; 0 goes on asking."""
    audit: Fraction = 0.1
    """With a taste: share of the groups it is sure of that you are asked about all the same, 0 to 1; more while it is
    often wrong."""
    timeout: Annotated[float, Range(0, 10_000_000)] = 0.0
    """Seconds to wait for an answer; then the iteration has the KL term alone and the run goes on; 0 waits for ever."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a killed run can go on from."""

    every: Count = 10
    """Iterations between two checkpoints, at least 1; there is always one at the end."""
    keep: Count = 2
    """Newest checkpoints to keep, at least 1."""


@dataclass(frozen=True)
class MemoryConfig:
    """Memory against time."""

    gradient_checkpointing: Switch = AUTO
    """Recompute activations in the backward pass: much less memory, an update takes 1.4 to 2.3 times as long; 'auto' is
    off where a GPU has the memory, and else on."""
    compile: bool = False
    """torch.compile the backbone: a slow start, then faster iterations."""
    offload: Switch = AUTO
    """Keep the text encoders and the VAE off the accelerator while they are not in use; 'auto' is off where a GPU has
    much memory to spare, and else on."""
    offload_blocks: bool = False
    """Keep the base's blocks in main memory and bring them to the accelerator in turn: for cards that the base is too
    large for, however small it is made; slower by what crosses the bus, forth and back."""
    prompt_cache: str = "auto"
    """Folder that keeps prompts as the text encoders read them, so that these need not be loaded again; 'auto' is
    dgpo/prompts in your cache folder."""
    prompt_cache_gib: NotNegative = 8.0
    """What all files in it take at most, in GiB; those used last stay. 0: nothing is kept, each run reads anew."""

    @property
    def recompute(self) -> bool:
        """`gradient_checkpointing`; where it is open, on."""
        return self.gradient_checkpointing if isinstance(self.gradient_checkpointing, bool) else True

    @property
    def move(self) -> bool:
        """`offload`; where it is open, on."""
        return self.offload if isinstance(self.offload, bool) else True


@dataclass(frozen=True)
class Config:
    """One run of DGPO."""

    name: str = ""
    """Name of the run folder; empty takes the preset's name, or 'run' where there is no preset."""
    output: str = "runs"
    """Folder in which run folders are made."""
    seed: Annotated[int, Range(-MOST_SEED, MOST_SEED)] = 0
    """Seed of everything random in the run."""
    iterations: Annotated[int, Range(1, MOST_ITERATIONS)] = 1000
    """Iterations (= optimiser steps) in all, 1 to a million; a resumed run may raise it."""
    minutes: NotNegative = 0.0
    """End after the iteration in which so many minutes are over, with those before a resume; 0: when all are done."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder of this name."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = NO_TRACKER
    """Also send metrics, and pictures where it takes any, to this tracker, whose package must be installed; --resume
    wants it named again."""
    reward: tuple[RewardTerm, ...] = (RewardTerm("shapes_graded"),)
    """Rewards: NAME=WEIGHT,... such as pickscore=1.0,clip_score=0.5; 'human' asks you; 'pickscore=1?ocr>0.5,ocr=0'
    counts where OCR is above 0.5; taste=FILE is a taste made of your answers; path/to/file.py:Name=1 a class of your
    own."""
    groups: str = ""
    """A folder of rated images to train on instead of roll-outs; their ratings are the reward."""
    combine: Literal["sum", "normalised"] = "sum"
    """Add the weighted rewards as they are, or each one's advantages (see training.advantage_std)."""
    on_bad_score: Literal["stop", "skip"] = "stop"
    """Where a reward fails or gives no number: stop the run with a checkpoint, or leave the group out and go on, until
    no group of ten iterations in a row could be scored."""
    watch: tuple[RewardTerm, ...] = ()
    """Rewards that each evaluation scores and nothing is trained on, as NAME,...; statistics are watched always."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    human: HumanConfig = field(default_factory=HumanConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
