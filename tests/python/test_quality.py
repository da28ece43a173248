"""The quality sweep's arithmetic and its documents, from records that are made up."""

from __future__ import annotations

import json

import pytest

from flashomni import quality
from flashomni.config import Config

STEPS, PROMPTS = 20, 3


def write_records(work, settings, seconds=10.0, psnr=35.0):
    """A finished picture of every prompt in each of `settings`; the worst prompt is the last."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "records.jsonl").open("a") as file:
        for setting in settings:
            for i, (prompt, seed) in enumerate(quality.prompts_of(PROMPTS)):
                record = {
                    "key": quality.key_of(setting, prompt, seed, STEPS),
                    "prompt": prompt,
                    "seed": seed,
                    "seconds": 40.0 if setting.group == "reference" else seconds,
                    "density": 0.5,
                    "shows_prompt": i != 1,
                }
                if setting.group != "reference":
                    record |= {"psnr": psnr - i, "ssim": 0.9}
                file.write(json.dumps(record) + "\n")


def test_settings_are_distinct_and_hold_the_papers():
    found = quality.settings()
    assert found[0].group == "reference" and found[0].config is None
    keys = {quality.key_of(s, "p", 0, STEPS) for s in found}
    assert len(keys) == len(found) and len({s.name for s in found}) == len(found)
    papers = [s.config for s in found if s.group == "paper"]
    assert {(c.tau_q, c.tau_kv, c.cache_interval, c.max_order, c.s_q) for c in papers} == {
        (0.5, 0.15, 5, 1, 0.3),
        (0.5, 0.05, 6, 1, 0.3),
    }
    assert {s.config.max_order for s in found if s.group == "sweep"} == {0, 1, 2}


def test_prompts_are_fixed_spread_and_checked():
    found = quality.prompts_of(4)
    assert found == quality.prompts_of(4) and len({p for p, _ in found}) == 4
    assert quality.prompts_of(2) == found[:2]
    with pytest.raises(ValueError, match="expected 1 to"):
        quality.prompts_of(0)


def test_key_tells_configurations_apart():
    a = quality.Setting("a", Config(tau_q=0.1))
    b = quality.Setting("a", Config(tau_q=0.2))
    assert quality.key_of(a, "p", 0, 20) != quality.key_of(b, "p", 0, 20)
    assert quality.key_of(a, "p", 0, 20) != quality.key_of(a, "p", 1, 20)
    assert quality.key_of(a, "p", 0, 20) != quality.key_of(a, "p", 0, 10)


def test_summary_is_over_the_same_prompts():
    dense = {p: {"seconds": 40.0, "shows_prompt": True} for p in "ab"}
    records = [
        {"prompt": "a", "seconds": 10.0, "density": 0.4, "shows_prompt": True, "psnr": 30.0, "ssim": 0.9},
        {"prompt": "b", "seconds": 30.0, "density": 0.6, "shows_prompt": False, "psnr": 20.0, "ssim": 0.7},
    ]
    found = quality.summarize(records, dense)
    assert found["speed_up"] == pytest.approx(2.0)
    assert (found["psnr"], found["worst_psnr"], found["worst_prompt"]) == (25.0, 20.0, "b")
    assert (found["shows_prompt"], found["dense_shows_prompt"]) == (1, 2)


def test_frontier_keeps_what_nothing_beats():
    points = [(1, 40), (2, 30), (1.5, 30), (1.5, 35), (0.9, 39), (2, 25)]
    rows = [{"speed_up": s, "psnr": p} for s, p in points]
    assert [(r["speed_up"], r["psnr"]) for r in quality.pareto(rows)] == [(1, 40), (1.5, 35), (2, 30)]


def test_records_survive_a_cut(tmp_path):
    write_records(tmp_path, quality.settings()[:1])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"key": "unfini')
    assert len(quality.read_records(tmp_path)) == PROMPTS


def test_documents_come_from_finished_settings(tmp_path):
    pytest.importorskip("matplotlib")
    settings = quality.settings()
    work, docs = tmp_path / "work", tmp_path / "docs"
    with pytest.raises(ValueError, match="holds 0 of 3 dense pictures"):
        quality.write_docs(work, docs, PROMPTS, STEPS)
    write_records(work, settings[:2])
    write_records(work, settings[5:6], seconds=20.0, psnr=33.0)
    write_records(work, settings[6:7], seconds=16.0, psnr=28.0)
    path = quality.write_docs(work, docs, PROMPTS, STEPS)
    content = json.loads((docs / "quality.json").read_text())
    assert [row["name"] for row in content["rows"]] == [settings[i].name for i in (0, 1, 5, 6)]
    table = path.read_text()
    assert f"`{settings[5].name}`, 2.00x at 32.0 dB" in table
    assert f"**{settings[6].name}**" in table and f"**{settings[1].name}**" not in table
    assert "| 2 of 3 |" in table and quality.prompts_of(PROMPTS)[2][0] in table
    assert (docs / "images" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_documents_say_when_nothing_is_good_enough(tmp_path):
    pytest.importorskip("matplotlib")
    settings = quality.settings()
    write_records(tmp_path, settings[:1])
    write_records(tmp_path, settings[5:6], psnr=20.0)
    path = quality.write_docs(tmp_path, tmp_path / "docs", PROMPTS, STEPS)
    assert "No setting of this sweep keeps a mean PSNR of 30 dB" in path.read_text()
