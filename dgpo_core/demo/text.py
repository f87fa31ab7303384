"""The embedded model's tokenizer and text encoders: real CLIP classes, small."""

import json
import tempfile
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

Encoder = TypeVar("Encoder", CLIPTextModel, CLIPTextModelWithProjection)

LENGTH = 12  # tokens: the longest prompt of the shapes world has ten, its two end marks included
WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(prompts: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's form, trained on `prompts` until every word of theirs is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=letters,
        special_tokens=[],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(prompts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    # as in CLIP's own vocabulary: every letter alone and as a word's last, the merges, then the two marks
    words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(words), START, END])}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocabulary))
        files[1].write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def make_text_encoder(tokenizer: CLIPTokenizer, kind: type[Encoder]) -> Encoder:
    """A two-layer CLIP text encoder of width 64, its words far apart from the start.

    CLIP's own initialisation (0.02) would leave all tokens nearly equal, and the transformer slow to notice the text.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = kind(config)
    # by its name: newer versions of transformers have it elsewhere in one of the kinds
    places = next(module for name, module in encoder.named_modules() if name.endswith("position_embedding"))
    embeddings = encoder.get_input_embeddings(), places
    for embedding, spread in zip(embeddings, (1.0, 0.5), strict=True):
        nn.init.normal_(embedding.weight, std=spread)
    return encoder
