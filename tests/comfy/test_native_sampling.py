"""Native roll-outs in a real ComfyUI: what KSampler draws for a seed, bit for bit on a CPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
from comfy_fixtures import seen_by

TOLERANCE = 2e-5
"""Of latents, as a share of the largest value: float32 sums in another order, over five steps. 8e-6 was measured."""
FAMILIES = ("sd15", "sdxl", "sd3", "flux", "qwen", "lumina", "hidream", "wan")
WELL_KNOWN = {"euler", "heun", "ddim", "dpmpp_2m", "uni_pc", "lms", "deis", "ipndm", "dpm_2", "heunpp2"}


found = seen_by("comfy_native_sampling.py", timeout=900)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_roll_out_is_what_ksampler_draws_for_its_seeds_bit_for_bit(found: dict[str, Any], family: str) -> None:
    assert found[family]["plain"] == [True] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_users_patches_and_kind_of_guidance_count_as_in_ksampler(found: dict[str, Any], family: str) -> None:
    assert found[family]["patched"] == [True] * 4


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_every_sampler_and_every_scheduler_is_ksamplers(found: dict[str, Any], family: str) -> None:
    case = found[family]
    assert all(case["samplers"].values()), case["samplers"]
    assert all(case["schedulers"].values()), case["schedulers"]
    assert {name.split()[0] for name in case["samplers"]} >= WELL_KNOWN
    assert len(case["schedulers"]) >= 9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_active_adapter_draws(found: dict[str, Any], family: str) -> None:
    case = found[family]["adapters"]
    assert case["old"] == 0
    assert case["current"] > 1000 * TOLERANCE
    assert case["loaded"] < TOLERANCE  # KSampler on the MODEL with the saved LoRA


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_training_timesteps_are_the_samplers_noise_levels(found: dict[str, Any], family: str) -> None:
    # an epsilon model has whole timesteps only: half of one is 0.005 in log(sigma) at the most
    assert max(found[family]["levels"].values()) < (5e-3 if family == "sd15" else 1e-6)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_on_the_models_own_levels_it_draws_what_the_engine_draws(found: dict[str, Any], family: str) -> None:
    assert max(found[family]["engines"].values()) < TOLERANCE


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_roll_out_stops_before_the_next_forward_and_leaves_the_model_as_it_was(
    found: dict[str, Any], family: str
) -> None:
    for case in found[family]["stopped"]:
        assert case["asked"] == [0, 1, 2, 3, 4, "stopped"]
        assert case["restored"]


def test_every_sampler_of_comfyui_is_offered_or_refused_with_one_that_is(found: dict[str, Any]) -> None:
    names = found["sd3"]["names"]
    for name, answer in names["node"].items():
        if answer is True:
            assert name in names["offered"]
            assert not re.search("ancestral|sde|lcm|ddpm|seeds|sa_solver", name)
        else:
            sibling = re.search("adds noise .* use '(.*)'|did you mean '(.*?)'", answer)
            assert sibling, answer
            assert (sibling[1] or sibling[2]) in names["offered"]
    assert "use 'euler'" in names["node"]["euler_ancestral"]
    assert "use 'dpm_2'" in names["node"]["dpm_2_ancestral"]
    assert "use 'res_multistep'" in names["node"]["res_multistep_ancestral"]


def test_names_of_solvers_and_schedulers_are_checked_with_one_clear_sentence(found: dict[str, Any]) -> None:
    names = found["sd3"]["names"]
    assert names["engine"]["unipc"] is True
    assert names["alias"] == "uni_pc"
    assert "use 'euler'" in names["engine"]["Euler_A"]
    assert "did you mean 'euler'" in names["engine"]["eulr"]
    assert names["schedulers"][:2] == [True, True]
    assert "no scheduler 'nothing': use one of simple" in names["schedulers"][2] == names["scheduler"]
    assert names["linked"] is True
    assert "adds noise" in names["policy"]
    assert "does not exist for native policies: did you mean 'lms'" in names["plms"]
    assert "unipc" not in names["offered"]
    assert "plms" in names["offered"]
