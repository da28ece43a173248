"""Configuration: defaults, presets, and fields that are refused by name."""

import dataclasses

import pytest

from flashomni import Config


def test_defaults_and_presets() -> None:
    assert Config() == Config.preset("default")
    flux = Config.preset("flux")
    assert (flux.tau_q, flux.tau_kv, flux.cache_interval, flux.max_order, flux.s_q) == (0.5, 0.15, 5, 1, 0.3)
    video = Config.preset("hunyuan_video")
    assert (video.tau_q, video.tau_kv, video.cache_interval, video.ramp_power) == (0.5, 0.05, 6, 1.7)
    assert Config.preset("flux", max_order=2) == dataclasses.replace(flux, max_order=2)
    assert Config(dense_layers=[0, 3]).dense_layers == (0, 3)
    assert hash(Config()) == hash(Config())


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="default, exact, flux, hunyuan_video.*'fluxx'"):
        Config.preset("fluxx")
    with pytest.raises(ValueError, match="no such field: tau"):
        Config.preset("flux", tau=0.5)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("cache_interval", 0, ValueError),
        ("cache_interval", 2.5, TypeError),
        ("cache_interval", True, TypeError),
        ("max_order", 4, ValueError),
        ("max_order", -1, ValueError),
        ("tau_q", 1.1, ValueError),
        ("tau_q", float("nan"), ValueError),
        ("tau_kv", -0.1, ValueError),
        ("tau_kv", "0.1", TypeError),
        ("s_q", 2, ValueError),
        ("self_similarity", -0.1, ValueError),
        ("disable_cache_before_step", -1, ValueError),
        ("cooldown_steps", -1, ValueError),
        ("ramp_power", float("inf"), ValueError),
        ("ramp_power", -1, ValueError),
        ("block_q", 100, ValueError),
        ("block_kv", 32, ValueError),
        ("cache_dtype", "float8", ValueError),
        ("history", "disk", ValueError),
        ("policy", "", TypeError),
        ("dense_layers", 3, TypeError),
        ("dense_layers", (-1,), ValueError),
        ("dense_layers", ("0",), TypeError),
        ("strict", 1, TypeError),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field}: expected .*, got "):
        Config(**{field: value})
