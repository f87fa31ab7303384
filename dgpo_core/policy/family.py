"""What a family of models says of itself: how they are known, what they predict, and how their LoRAs are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from dgpo_core.policy.lora.names import Place

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
"""What pipelines call those components."""


class Family:
    """The facts that loading, training and saving need; what has a value here a family may leave out."""

    pipeline_classes: ClassVar[tuple[str, ...]]
    """`_class_name`s in model_index.json that belong to this family; the first is the one that is built."""
    network_name: ClassVar[str]
    """The pipeline's attribute, and the prefix of the LoRA's keys: "transformer" or "unet"."""
    targets: ClassVar[tuple[str, ...]]
    """Default LoRA targets: all q, k, v and out projections of the image stream and of the text stream."""
    architecture: ClassVar[str]
    """`modelspec.architecture` of the LoRA, without its "/lora"."""
    base_version: ClassVar[str]
    """`ss_base_model_version` of the LoRA."""
    kinds: ClassVar[tuple[str, ...]] = ("flow",)
    """The predictions that models of this family can have."""
    betas: ClassVar[Mapping[str, Any]] = {}
    """The scheduler's config where an epsilon or v model's own has no betas."""
    predicted_by: ClassVar[Mapping[str, str]] = {}
    """The prediction by what `modelspec.architecture` begins with, where that says it."""
    marks: ClassVar[tuple[str, ...]]
    """Tensors by which a single checkpoint is known, each of them enough; the network's prefix is left out."""
    looks_like: ClassVar[str] = ""
    """The family whose single checkpoints have the same tensors; one of this family has its name in the file's name or
    header, or is asked for by it."""
    known_as: ClassVar[tuple[str, ...]] = ()
    """Names of kinds that `recognise` would refuse but for this family."""
    other_pipelines: ClassVar[Mapping[str, str]] = {}
    """What is in the folders of pipelines that resemble this family's, by `_class_name`, and what to take."""
    other_models: ClassVar[Mapping[str, str]] = {}
    """What pipelines of these classes are, and what to take, by what is then true in model_index.json, or a component
    that they then have."""
    other_names: ClassVar[Mapping[str, str]] = {}
    """What single checkpoints with these marks are, and what to take, by what is then in the file's name or header
    (small, with - for _)."""
    built_as_named: ClassVar[bool] = False
    """Whether a folder's pipeline is built as the class that it names, in place of the first of `pipeline_classes`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Packages that its pipeline needs and that are not ours to require."""
    bare_names: ClassVar[bool] = False
    """Whether diffusers knows a single checkpoint's tensors without the network's prefix alone."""
    input_layer: ClassVar[str]
    """The tensor of a single checkpoint, without prefix, whose second dimension is the network's input channels."""
    other_inputs: ClassVar[Mapping[int, str]] = {}
    """What networks of this architecture are that take another number of channels than a noisy latent has."""
    packing: ClassVar[int] = 1
    """Input channels of the network for each channel of the latent."""
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    """By component, tensors of a single checkpoint of which one says that the component is in it, and whole; none where
    it is never read from there."""
    example: ClassVar[str] = ""
    """A model of it on the hub, whose folder has all parts; for families of which no single file has all."""
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """Those of `parts` that a model can do without."""
    kept_whole: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of Linears within blocks that are never quantised."""
    brought: ClassVar[Mapping[str, str]] = {}
    """What published folders of it lack, as its licence is another: by component, what to put there."""
    repeated_blocks: ClassVar[tuple[str, ...]] = ()
    """Classes of blocks that are compiled one by one, where diffusers does not name them."""
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Components without which it cannot read prompts."""
    side: ClassVar[int] = 0
    """Pixels of a side of the pictures that it was made for; 0 where pipeline or network says it."""
    patch: ClassVar[int] = 1
    """Latent height and width are multiples of this."""

    @classmethod
    def makers_names(cls, network: Any, own: Mapping[str, nn.Module]) -> Iterable[tuple[str, Place]]:
        """The names that the network's makers gave to its modules, which LoRAs of other trainers have.

        own: the modules that can carry a LoRA, by name. Each name comes with its place; one for a module that is not in
        `own` counts for nothing.
        """
        return ()

    @classmethod
    def prediction_of_weights(cls, state: Mapping[str, Tensor]) -> str:
        """ "epsilon", "v" or "flow", where a single checkpoint's weights say it better than the configs of the hub."""
        return ""
