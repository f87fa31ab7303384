"""Folders of rated images as artists have them: drawn by the embedded model, rated by its verifier, in every form."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dgpo_core.common.group import Group
from dgpo_core.common.pictures import to_pil
from dgpo_core.common.seeds import derive_seed
from dgpo_core.method.rollout import rollout
from dgpo_core.people.gallery import read_gallery
from dgpo_core.rewards import make_reward, score_groups
from dgpo_core.runs import assemble
from dgpo_core.settings.presets import load_preset


def draw(prompts: int, size: int, seed: int = 0) -> list[Group]:
    """Groups of the embedded base model, for prompts spread over those of its training, with `shapes_graded` scores."""
    config = load_preset("quickstart")
    policy, pixels = assemble.load_model(config, "cpu")
    every = assemble.training_prompts(config)
    few = every[:: len(every) // prompts][:prompts]
    seeds = [[derive_seed(seed, "folder", g, i) for i in range(size)] for g in range(prompts)]
    solver = policy.solver(config.rollout.solver, config.rollout.steps, *pixels)
    with policy.using(None):
        groups = rollout(policy, solver, few, seeds, size=pixels, batch=config.rollout.at_once)
    return score_groups(groups, {"rating": make_reward("shapes_graded")})


def comfy_graph(prompt: str, name: str = "art") -> dict[str, Any]:
    """ComfyUI's default text-to-image workflow in API format, as SaveImage writes it into its files."""
    return {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 1, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
                "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "model.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": name, "images": ["8", 0]}},
    }  # fmt: skip


def comfy_chunks(prompt: str) -> PngInfo:
    """The text chunks of ComfyUI's SaveImage (0.3.64: the graph under "prompt", extras under their names)."""
    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps(comfy_graph(prompt)))
    chunks.add_text("workflow", json.dumps({"nodes": [], "links": [], "version": 0.4}))
    return chunks


def write(folder: Path, groups: Sequence[Group], form: str) -> None:
    """The groups in a folder. form: sidecar, csv, comfy (prompts in the PNGs alone) or jsonl."""
    folder.mkdir(parents=True)
    rows, lines = [], []
    for g, group in enumerate(groups):
        names = [f"{g:03d}_{i:02d}.png" for i in range(len(group))]
        ratings = [round(score, 4) for score in group.scores["rating"].tolist()]
        text = group.prompt.text
        for name, image, rating in zip(names, group.images, ratings, strict=True):
            to_pil(image).save(folder / name, pnginfo=comfy_chunks(text) if form == "comfy" else None)
            rows.append((name, rating, text))
        lines.append({"prompt": text, "images": names, "ratings": ratings})
    if form == "jsonl":
        (folder / "preferences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif form == "sidecar":
        for name, rating, text in rows:
            (folder / name).with_suffix(".json").write_text(json.dumps({"rating": rating, "prompt": text}))
    else:
        with (folder / "ratings.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("file", "rating", "prompt") if form == "csv" else ("file", "rating"))
            table.writerows(rows if form == "csv" else [row[:2] for row in rows])


def paint(path: Path, prompt: str = "") -> Path:
    """A small picture; with a prompt, as ComfyUI saves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = {"pnginfo": comfy_chunks(prompt)} if prompt else {}
    Image.new("RGB", (8, 8), "teal").save(path, **chunks)
    return path


def groups(folder: Path) -> list[tuple[str, list[str], list[float]]]:
    """Prompt, file names and scores of each group."""
    return [(g.prompt, [path.name for path in g.files], list(g.scores)) for g in read_gallery(folder).groups]
