"""The report: metrics against scikit-image, data round trips, and a page that needs nothing but itself."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from flashomni.report import data, figures, metrics, page, strip

LAYERS = ["double 0", "double 1", "single 0"]
HEADS, BLOCKS, STEPS = 2, 9, 10


def scene(seed: int, side: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picture = np.full((side, side, 3), 230, np.uint8)
    y, x, r = *rng.integers(side // 4, side // 2, 2), side // 4
    picture[y : y + r, x : x + r] = rng.integers(0, 200, 3)
    return picture


def synthetic_run(folder, side: int = 32, seed: int = 0) -> data.Run:
    """A run with three arms and two pictures; numbers drawn, in the form that the demo writes."""
    rng = np.random.default_rng(seed)
    kinds = ["full"] * 3 + ["update", "dispatch", "dispatch"] * 2 + ["full"]
    share = np.ones((STEPS, len(LAYERS), HEADS))
    dispatch = np.array([kind == "dispatch" for kind in kinds])
    share[dispatch] = rng.uniform(0.1, 0.7, (dispatch.sum(), len(LAYERS), HEADS))
    arms = [
        {
            "key": "torch",
            "title": "Dense, torch SDPA",
            "note": "diffusers as it is",
            "time": {"attention": 2.0, "MLP": 1.5, "other": 0.2},
        },
        {
            "key": "dense",
            "title": "Dense, our kernels",
            "note": "every bit set",
            "time": {"attention": 1.6, "MLP": 1.5, "other": 0.2},
        },
        {
            "key": "flashomni",
            "title": "FlashOmni",
            "note": "N=3",
            "time": {"attention": 0.7, "MLP": 1.5, "other": 0.3},
        },
    ]
    pictures = []
    for i, prompt in enumerate(["a red star", "a <blue> & round circle"]):
        results = {}
        reference = scene(i, side)
        for arm, total in zip(arms, (3.7, 3.3, 2.5), strict=True):
            noise = rng.integers(0, 1 if arm["key"] == "torch" else 7, reference.shape)
            picture = (reference + noise).astype(np.uint8)
            name = f"{i}-{arm['key']}.png"
            Image.fromarray(picture).save(folder / name)
            results[arm["key"]] = {
                "file": name,
                "seconds": total,
                "step_seconds": [total / STEPS] * STEPS,
                "shows_prompt": True,
                "density": 1.0,
            }
            if arm["key"] != "torch":
                results[arm["key"]] |= {
                    "psnr": metrics.psnr(picture, reference),
                    "ssim": metrics.ssim(picture, reference),
                }
        pictures.append({"prompt": prompt, "seed": i, "arms": results})
    selected = rng.random((BLOCKS, BLOCKS)) < 0.4
    active = rng.random(BLOCKS) < 0.7
    selected[~active] = False
    content = {
        "created": "2026-01-01T00:00:00Z",
        "command": "flashomni demo --seed 0",
        "machine": {"cpu": "a chip", "threads": 2},
        "model": {"name": "tiny_flux", "dtype": "float32", "layers": LAYERS, "heads": HEADS},
        "config": {"cache_interval": 3, "tau_q": 0.5},
        "steps": STEPS,
        "schedule": [{"kind": kind, "ramp": 1.0, "since_update": 0} for kind in kinds],
        "arms": arms,
        "pictures": pictures,
        "density": {"pairs": share.tolist(), "tiles": np.sqrt(share).tolist()},
        "masks": [
            {
                "step": 3,
                "layer": LAYERS[0],
                "head": 1,
                "rows": BLOCKS,
                "columns": BLOCKS,
                "bits": data.pack_mask(selected),
                "active": data.pack_mask(active),
            }
        ],
    }
    data.save(content, folder)
    return data.load(folder)


@pytest.mark.parametrize("noise", [1, 5, 40])
def test_metrics_agree_with_scikit_image(noise):
    skimage = pytest.importorskip("skimage.metrics")
    a = scene(1, 64)
    b = np.clip(
        a.astype(int) + np.random.default_rng(noise).integers(-noise, noise + 1, a.shape), 0, 255
    ).astype(np.uint8)
    assert metrics.psnr(a, b) == pytest.approx(skimage.peak_signal_noise_ratio(a, b), abs=1e-9)
    assert metrics.ssim(a, b) == pytest.approx(skimage.structural_similarity(a, b, channel_axis=2), abs=1e-9)


def test_equal_pictures_have_a_finite_psnr():
    a = scene(2)
    assert metrics.psnr(a, a) == metrics.PSNR_OF_EQUAL and metrics.ssim(a, a) == pytest.approx(1)
    assert not metrics.amplified_difference(a, a).any()


@pytest.mark.parametrize("bad", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_metrics_refuse_what_is_no_picture(bad):
    with pytest.raises(ValueError, match="expected uint8"):
        metrics.psnr(bad, bad)


def test_metrics_refuse_pictures_of_two_sizes():
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.ssim(scene(0, 32), scene(0, 64))


def test_difference_is_amplified_and_clipped():
    a, b = scene(3), scene(3)
    b[0, 0] = a[0, 0] - 3
    b[0, 1] = a[0, 1] - 100
    difference = metrics.amplified_difference(a, b, gain=8)
    assert (difference[0, 0] == 24).all() and (difference[0, 1] == 255).all() and not difference[1:].any()


@pytest.mark.parametrize("shape", [(1, 1), (9, 9), (33, 33), (3, 17)])
def test_masks_survive_packing(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    assert (data.unpack_mask(data.pack_mask(mask), *shape) == mask).all()


def test_unpack_refuses_too_few_bits():
    with pytest.raises(ValueError, match="needs 100 bits, got 8"):
        data.unpack_mask(data.pack_mask(np.ones((1, 8), bool)), 10, 10)


def test_speed_up_compares_only_pictures_that_both_arms_drew(tmp_path):
    run = synthetic_run(tmp_path)
    assert run.speed_up("flashomni") == pytest.approx(3.7 / 2.5)
    del run.json["pictures"][1]["arms"]["flashomni"]
    run.json["pictures"][1]["arms"]["torch"]["seconds"] = 1000.0
    assert run.speed_up("flashomni") == pytest.approx(3.7 / 2.5)


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, and checks that tags close."""

    void = {"meta", "img", "br", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.resources, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.resources += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_page_is_whole_and_self_contained(tmp_path):
    path = page.write(synthetic_run(tmp_path))
    source = path.read_text(encoding="utf-8")
    parsed = Page()
    parsed.feed(source)
    assert not parsed.open
    assert parsed.resources and all(r.startswith("data:image/png;base64,") for r in parsed.resources)
    assert not re.search(r"https?://|url\(|@import|<script", source)
    # 3 pictures a prompt, 2 differences a prompt, 1 mask.
    assert parsed.tags.count("img") == 2 * (3 + 2) + 1
    assert "&lt;blue&gt; &amp; round" in source and "<blue>" not in source
    assert "1.48×" in source  # 3.7 / 2.5
    for title in (
        "Where the time went",
        "Step by step",
        "What was computed",
        "Masks",
        "Configuration",
        "Machine",
    ):
        assert title in source


def test_page_warns_of_a_busy_machine(tmp_path):
    run = synthetic_run(tmp_path)
    assert page.disturbance(run) == "" and 'class="warning"' not in page.render(run)
    steps = run.json["pictures"][0]["arms"]["torch"]["step_seconds"]
    steps[:5] = [3 * s for s in steps[:5]]
    assert "Do not trust the times" in page.disturbance(run) and 'class="warning"' in page.render(run)


def test_strip_has_a_row_a_prompt_and_a_column_an_arm(tmp_path):
    run = synthetic_run(tmp_path, side=256)
    picture = np.asarray(strip.compose(run))
    assert picture.shape[1] == 3 * (strip.SIDE + strip.GAP) + strip.GAP
    left, top = strip.GAP + strip.SIDE + strip.GAP, strip.GAP  # the second arm of the first prompt
    shown = picture[top + 1 : top + strip.SIDE - 1, left + 1 : left + strip.SIDE - 1]
    assert (shown == np.asarray(Image.open(run.picture(0, "dense")))[1:-1, 1:-1]).all()


def test_page_does_without_what_a_dense_run_lacks(tmp_path):
    run = synthetic_run(tmp_path)
    del run.json["density"], run.json["masks"]
    source = page.render(run)
    assert "Masks" not in source and "The pictures" in source


def test_mask_image_has_one_pixel_a_block_pair():
    import base64
    import io

    selected = np.array([[1, 0, 1], [0, 0, 0]], bool)
    uri = figures.mask_image(selected, np.array([True, False]))
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert picture.shape == (2, 3, 3)
    assert tuple(picture[0, 0]) == figures.MASK_COLOURS["computed"]
    assert tuple(picture[0, 1]) == figures.MASK_COLOURS["skipped"]
    assert tuple(picture[1, 0]) == figures.MASK_COLOURS["cached"]


@pytest.mark.parametrize("largest,step", [(1, 0.2), (3.7, 1), (42, 10), (0.011, 0.0025)])
def test_ticks_are_round(largest, step):
    assert figures.nice_step(largest) == pytest.approx(step)


def test_clock_knows_every_linear_layer_of_the_blocks():
    diffusers = pytest.importorskip("diffusers")
    from flashomni.report import clock
    from flashomni.tiny_flux.pipeline import transformer_config

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**transformer_config())
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "transformer_blocks" not in path or ".norm" in path:
            continue
        parents = [path.rsplit(".", i)[0] for i in range(path.count("."))]
        found = [p for p in parents for pattern in (clock.PROJECTION, clock.MLP) if pattern.search(p)]
        assert len(found) == 1, (path, found)


def test_clock_splits_the_time_and_leaves_no_hooks():
    from flashomni.report.clock import ModelClock

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})
            self.ff = torch.nn.Linear(8, 8)

        def forward(self, x):
            q = self.attn["to_q"](x)
            return self.ff(torch.nn.functional.scaled_dot_product_attention(q, q, q))

    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList([Block()])
    with ModelClock(model) as clock:
        model.transformer_blocks[0](torch.randn(1, 4, 8))
    parts = clock.breakdown(10.0)
    assert set(parts) == {"attention", "projections", "MLP", "other"} and all(v > 0 for v in parts.values())
    assert sum(parts.values()) == pytest.approx(10.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no file .*run.json"):
        data.load(tmp_path)
    path = tmp_path / "run.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="format None"):
        data.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        data.load(path)
    path.write_text(json.dumps({"format": data.FORMAT, "steps": 3}))
    with pytest.raises(ValueError, match="lacks created, command"):
        data.load(path)
