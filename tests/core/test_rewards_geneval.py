"""GenEval: the detectors on tiny networks, and the two rewards. The rules: test_geneval_rules.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_clip
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from dgpo_core.common.errors import UserError
from dgpo_core.rewards import make_reward, require_reward
from dgpo_core.rewards.geneval import detector as detector_module
from dgpo_core.rewards.geneval.detector import Detector
from dgpo_core.rewards.geneval.reward import GenEval, GenEvalTraining, crop
from dgpo_core.rewards.geneval.rules import COLORS, Detection
from dgpo_core.rewards.weight_files import Weights, load_network


def see(label: str, score: float = 0.95, box: tuple[float, ...] = (0.0, 40.0, 40.0, 80.0)) -> Detection:
    return Detection(label, score, box)


DOG, CUPS = {"class": "dog", "count": 1}, {"class": "cup", "count": 3}
FOUR = [{"class": "cup", "count": 4}]


# -- detectors


NAMES = {0: "person", 1: "dog", 2: "mouse", 3: "pottedplant"}


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        embed_dim=4, depths=[1] * 4, num_heads=[1] * 4, window_size=2, image_size=64, out_features=stages
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=8,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=8,
        num_queries=6,
        id2label=NAMES,
        label2id={name: index for index, name in NAMES.items()},
    )
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def yolos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        use_mid_position_embeddings=False,
        id2label=NAMES,
        label2id={name: index for index, name in NAMES.items()},
    )
    folder = tmp_path_factory.mktemp("yolos")
    YolosForObjectDetection(config).save_pretrained(folder)
    processor = (
        '{"image_processor_type": "YolosImageProcessor", "size": {"height": 32, "width": 32}, "do_pad": false,'
        ' "format": "coco_detection"}'
    )
    (folder / "preprocessor_config.json").write_text(processor)
    return folder


def test_mask2former_runs(mask2former: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector_module, "EDGES", (64, 96))
    detect = Detector(str(mask2former), "geneval")
    assert set(detect.labels.values()) == {"person", "dog", "computer mouse", "potted plant"}
    with torch.no_grad():
        found = detect(torch.rand(2, 3, 40, 60), 0.0)
    assert len(found) == 2
    for detection in [d for each in found for d in each]:
        assert detection.label in detect.labels.values()
        assert detection.mask.shape == (40, 60)
        left, top, right, bottom = detection.box
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40


def test_mask2former_scores_and_boxes(mask2former: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On hand-made outputs: probability of the class times mean probability of the mask, and the mask's bounds."""
    detect = Detector(str(mask2former), "geneval")
    classes, masks = torch.zeros(1, 3, 5), torch.full((1, 3, 8, 8), -20.0)
    classes[0, 0, 1], masks[0, 0, 2:5, 1:7] = 4.0, 2.0
    classes[0, 1, 4], masks[0, 1] = 9.0, 2.0  # nothing
    classes[0, 2, 0] = 9.0  # a sure class without a single pixel
    out = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    monkeypatch.setattr(detect, "model", type("Model", (), {"device": "cpu", "__call__": lambda self, **k: out})())
    (found,) = detect(torch.rand(1, 3, 8, 8), 0.3)
    (dog,) = found
    assert dog.label == "dog"
    expected = torch.tensor([0, 4.0, 0, 0, 0]).softmax(0)[1] * torch.tensor(2.0).sigmoid()
    assert dog.score == pytest.approx(float(expected), abs=1e-6)
    assert dog.box == (1, 2, 7, 5)
    assert int(dog.mask.sum()) == 18
    assert detect(torch.rand(1, 3, 8, 8), 0.9) == [[]]


def test_a_detector_with_boxes(yolos: Path) -> None:
    detect = Detector(str(yolos), "geneval")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = detect(images, 0.0)
        model = load_network(YolosForObjectDetection, Weights("no-one/none", ""), str(yolos), "test")
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (detector_module.MEAN, detector_module.STD))
        out = model(pixel_values=((images * 255).round() / 255 - mean) / std)
    probability, label = out.logits.softmax(-1)[..., :-1].max(-1)
    for n, each in enumerate(found):
        assert [d.label for d in each] == [detect.labels[int(i)] for i in label[n]]
        torch.testing.assert_close(torch.tensor([d.score for d in each]), probability[n], atol=1e-4, rtol=0)
        x, y, w, h = (out.pred_boxes[n] * 32).unbind(-1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1).clamp(0, 32)
        torch.testing.assert_close(torch.tensor([d.box for d in each]), corners, atol=1e-2, rtol=0)


def test_a_detector_of_other_classes_is_refused(mask2former: Path, tmp_path: Path) -> None:
    for file in mask2former.iterdir():
        text = file.read_bytes()
        (tmp_path / file.name).write_bytes(text.replace(b'"person"', b'"table"') if file.suffix == ".json" else text)
    with pytest.raises(UserError, match="was not trained on the classes of COCO"):
        Detector(str(tmp_path), "geneval")
    with pytest.raises(UserError, match="needs no-one/no-model"):
        Detector("no-one/no-model", "geneval")


# -- the reward


class Stub:
    """A detector that always finds the same."""

    def __init__(self, found: list[Detection]) -> None:
        self.labels = dict(enumerate(("person", "dog", "cat", "cup")))
        self.found, self.model = found, torch.nn.Identity()

    def __call__(self, images: Tensor, threshold: float) -> list[list[Detection]]:
        return [[d for d in self.found if d.score > threshold]] * len(images)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.save(tmp_path_factory.mktemp("clip"))


FACTS = [
    {"tag": "counting", "include": [CUPS], "exclude": FOUR},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [CUPS]},
    {"tag": "single_object", "include": [DOG]},
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "expected"), [(GenEval, [0, 1, 1]), (GenEvalTraining, [2 / 3, 1, 0])])
def test_what_is_reported_and_what_is_trained_on_are_two_rewards(
    kind: type, expected: list, mask2former: Path, clip: Path
) -> None:
    reward = kind(detector=str(mask2former), clip=str(clip), batch=2)
    reward.detector = Stub([see("cup", 0.95)] * 2 + [see("dog", 0.5), see("dog", 0.4)])
    images, prompts = torch.rand(3, 3, 100, 100), ["three cups", "two cups", "a dog"]
    scores = reward.score(images, prompts, FACTS)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))
    with pytest.raises(UserError, match="'a dream'"):
        reward.score(images[:1], ["a dream"], [{}])


@pytest.mark.parametrize("value", [True, False, "very"])
@pytest.mark.parametrize("find", [make_reward, require_reward])
def test_the_option_graded_of_old_settings_says_which_reward_to_name_instead(find: object, value: object) -> None:
    with pytest.raises(UserError, match="'geneval' has no option graded any more: .*'geneval_training'"):
        find("geneval", {"graded": value})


def test_colours_are_the_nearest_sentences_by_clip(mask2former: Path, clip: Path) -> None:
    reward = GenEval(detector=str(mask2former), clip=str(clip))
    picture = Image.fromarray((torch.rand(100, 100, 3) * 255).byte().numpy())
    found = [see("dog", box=(0, 0, 32, 32)), see("dog", box=(40, 10, 90, 60)), see("dog", box=(5, 5, 5, 5))]
    with torch.no_grad():
        got = reward.colors_of(picture, found, "dog")
        assert reward.colors_of(picture, found[1:2], "dog") == got[1:2]

    model, tok = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    sentences = ["a photo of a {} dog", "a photo of a {}-colored dog", "a photo of a {} object"]
    means = []
    with torch.no_grad():
        for color in COLORS:
            embeddings = []
            for sentence in sentences:
                ids = tok(sentence.format(color), truncation=True, max_length=16, return_tensors="pt").input_ids
                x = model.text_projection(model.text_model(ids).pooler_output)[0]
                embeddings.append(x / x.norm())
            mean = torch.stack(embeddings).mean(0)
            means.append(mean / mean.norm())
        image = torch.cat([reward.clip.images([crop(picture, d)]) for d in found])
    assert got == [COLORS[int((x @ torch.stack(means).T).argmax())] for x in image]


def test_crop_greys_out_what_is_not_the_object() -> None:
    picture = Image.new("RGB", (10, 8), "red")
    mask = torch.zeros(8, 10, dtype=torch.bool)
    mask[2:4, 3:5] = True
    piece = crop(picture, Detection("dog", 1.0, (2, 1, 6, 5), mask))
    assert piece.size == (4, 4)
    assert piece.getpixel((1, 1)) == (255, 0, 0)
    assert piece.getpixel((0, 0)) == (0x99, 0x99, 0x99)
    assert crop(picture, Detection("dog", 1.0, (2, 1, 6, 5))).getpixel((0, 0)) == (255, 0, 0)
