"""The native policy in a real ComfyUI: exact gradients, a base left alone, and a LoRA that its own loader applies."""

from __future__ import annotations

import math
from typing import Any

import pytest
from comfy_families import MODULES, TOLERANCE
from comfy_fixtures import seen_by

UNUSED = {"qwen": 2}  # of its last block the text's q and out: nothing is made of them
PREDICTIONS = {"sd15": "epsilon", "sdxl": "epsilon"}  # the others' is flow
BLOCKS = {
    "sd15": 12, "sdxl": 12, "sd3": 2, "flux": 6, "qwen": 3, "lumina": 4, "zimage": 4, "hidream": 4, "wan": 3, "aura": 3,
}  # fmt: skip
LATENTS = {
    "lumina": [16, 16, 16], "zimage": [16, 16, 16], "hidream": [16, 16, 16], "qwen": [16, 1, 16, 16],
    "wan": [16, 1, 16, 16],
}  # fmt: skip
LABELS = {
    "sd15": "sd_v1", "sdxl": "sdxl_base_v1-0", "sd3": "sd3", "flux": "flux1", "qwen": "qwen_image",
    "lumina": "lumina2", "zimage": "zimage", "hidream": "hidream_i1", "wan": "wan21", "aura": "auraflow",
}  # fmt: skip


found = seen_by("comfy_native.py", timeout=900)


@pytest.fixture(params=MODULES)
def family(request: pytest.FixtureRequest, found: dict[str, Any]) -> str:
    """One that this ComfyUI has."""
    if request.param not in found:
        pytest.skip(f"this ComfyUI has no {request.param}")
    return request.param


def test_it_predicts_what_the_network_returns(found: dict[str, Any], family: str) -> None:
    assert found[family]["training"]["base"] < TOLERANCE  # at the engine's own x_t and t


def test_gradients_are_those_of_plain_autograd(found: dict[str, Any], family: str) -> None:
    case = found[family]["training"]
    assert case["prediction"] < TOLERANCE
    assert case["gradient"] < TOLERANCE
    assert case["effect"] > 1000 * TOLERANCE
    assert max(case["checkpointed"]) < TOLERANCE
    assert case["blocks"] == BLOCKS[family]


def test_gradients_reach_all_of_the_lora_and_nothing_else(found: dict[str, Any], family: str) -> None:
    case = found[family]["training"]
    assert case["targets"] == MODULES[family]
    assert case["reached"] == 2 * (MODULES[family] - UNUSED.get(family, 0))
    assert case["others"] == 0


def test_autograd_saves_no_weight_of_the_base(found: dict[str, Any], family: str) -> None:
    assert found[family]["training"]["saved"] == 0


def test_a_batch_of_several_texts_is_its_rows(found: dict[str, Any], family: str) -> None:
    assert found[family]["rows"]["rows"] < TOLERANCE
    assert found[family]["rows"]["texts"] > 0.1  # the texts do something


def test_comfyuis_own_loader_applies_the_lora(found: dict[str, Any], family: str) -> None:
    case = found[family]["saving"]
    assert case["keys"] == 2 * case["patched"] == 2 * MODULES[family]
    assert case["not_loaded"] == []
    assert case["loaded"] < TOLERANCE
    assert case["metadata"]["modelspec.prediction_type"] == PREDICTIONS.get(family, "flow")
    assert case["metadata"]["ss_base_model_version"] == LABELS[family]
    assert case["metadata"]["ss_network_dim"] == case["metadata"]["ss_network_alpha"] == "4"


def test_a_lora_on_the_model_is_trained_on_top_of(found: dict[str, Any], family: str) -> None:
    assert found[family]["saving"]["on_top"] < TOLERANCE
    assert found[family]["saving"]["still_there"]


def test_the_model_is_left_as_it_was(found: dict[str, Any], family: str) -> None:
    assert found[family]["restoring"] == dict.fromkeys(("after", "after_error", "keys", "clean", "inference"), True)


def test_a_picture_of_a_video_model_is_one_frame(found: dict[str, Any], family: str) -> None:
    case = found[family]["pictures"]
    assert case["latents"] == LATENTS.get(family, [4, 16, 16])
    assert case["decoded"] == [3, 3, 128, 128]
    assert case["encoded"] == [3, *case["latents"]]
    assert case["alone"] < TOLERANCE  # several pictures are no video


def test_the_trainer_trains(found: dict[str, Any], family: str) -> None:
    case = found[family]["iterating"]
    assert len(case["metrics"]) == 2
    assert all(math.isfinite(value) for metrics in case["metrics"] for value in metrics.values())
    assert all(metrics["informative"] == 1 and metrics["grad_norm"] > 0 for metrics in case["metrics"])
    assert case["metrics"][0]["kl"] == 0 < case["metrics"][1]["kl"]
    shape, low, high = case["images"]
    assert shape == [4, 3, 128, 128]
    assert 0 <= low < high <= 1
    assert case["spread"] > 0.01  # every sample has a noise of its own
    assert case["moved"] > 0.01
    assert case["finite"]
    assert case["restored"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_weights_of_a_smaller_type_are_cast(found: dict[str, Any], dtype: str) -> None:
    case = found["sd3"][dtype]
    assert case["prediction"] < TOLERANCE
    assert case["gradient"] < TOLERANCE


def test_a_noise_schedule_that_a_node_put_on_the_model_counts(found: dict[str, Any]) -> None:
    case = found["sd15"]["kinds"]
    assert case["kinds"] == ["epsilon", "v", "v"]
    assert case["v"] < TOLERANCE


def test_what_the_model_predicts_can_be_decided_by_hand(found: dict[str, Any]) -> None:
    case = found["sd15"]["kinds"]
    assert case["by_hand"] < TOLERANCE
    assert case["own"]  # what it says anyway needs no patch


def test_zero_terminal_snr_has_no_division_by_zero(found: dict[str, Any]) -> None:
    case = found["sd15"]["kinds"]
    assert 0 < case["terminal"] < 1e-3
    assert case["finite"]


def test_a_sampling_node_is_honoured_or_refused_by_name(found: dict[str, Any]) -> None:
    case = found["sd15"]["sampling_nodes"]
    assert (case["eps False"], case["v_prediction False"], case["v_prediction True"]) == ("epsilon", "v", "v")
    assert case["flow"] == "flow"
    assert "zero terminal SNR, which is impossible" in case["eps True"]
    for kind, name in (("lcm False", "LCM"), ("lcm True", "LCM"), ("x0 False", "X0"), ("edm", "ModelSamplingCont")):
        assert f"none that can be trained ({name}" in case[kind] or f"with {name}" in case[kind], case[kind]


def test_texts_are_encoded_once(found: dict[str, Any]) -> None:
    case = found["sd15"]["texts"]
    assert case["encoded"] == ["red", "blue", "green", "white", "red", "black", "grey"]
    assert case["known"] == [True, False]
    assert case["dropped"]
    assert case["by_size"] == [False, False, True, True]


def test_hooks_of_others_are_run_and_kept(found: dict[str, Any]) -> None:
    assert found["sd15"]["others"] == {"run": True, "there": True}


def test_models_that_cannot_be_trained_are_refused(found: dict[str, Any]) -> None:
    case = found["sd15"]["refused"]
    assert "none that can be trained (ModelSamplingContinuousEDM): use an epsilon, v or flow" in case["schedule"]
    assert case["targets"] == "No layer of the MODEL can carry a LoRA on the targets nowhere."
    assert "multiples of 8, not 100 x 128" in case["size"]
    assert "(time_embed.0, Parameter of torch.uint8)" in case["quantised"]
    assert "latents are no pictures" in case["sound"]


def test_the_steps_of_the_nodes_work_with_it(found: dict[str, Any]) -> None:
    case = found["sd3"]["node"]
    assert case["steps"] == [1, 2, 2]
    assert case["moved"]
    assert case["patched"] == MODULES["sd3"]
    assert case["differs"]
    assert case["restored"]
    assert case["metadata"]["dgpo.base"].startswith("SD3-")
    assert case["metadata"]["dgpo.step"] == "2"


def test_a_run_goes_on_with_the_same_files_loaded_again(found: dict[str, Any]) -> None:
    case = found["sd3"]["node"]
    assert case["named_alike"]
    assert case["resumed"]
    assert case["anew"]  # without its states it is the same from the start
    assert case["other_patches"]
    assert case["network"]


def test_a_model_that_comfyui_has_dropped_is_told(found: dict[str, Any]) -> None:
    case = found["sd3"]["node"]
    assert case["lost"] == [1, 1, 1, 0, 1]  # what a node has named before is not missed
    assert "no longer in memory" in case["gone"]


def test_the_weights_go_with_the_last_output_that_is_about_them(found: dict[str, Any]) -> None:
    assert found["sd3"]["node"]["freed"] == [False, True]


def test_a_bad_name_of_a_run_is_told(found: dict[str, Any]) -> None:
    assert "cannot be a folder name" in found["sd3"]["node"]["bad_run"]


def test_cudnns_attention_whose_backward_can_fail_is_never_chosen(found: dict[str, Any]) -> None:
    assert found["sd15"]["kernels"] == {"used": ["MATH"], "left": ["CUDNN_ATTENTION", "MATH"]}
