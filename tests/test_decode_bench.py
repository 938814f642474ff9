"""The decode benchmark: complete, consistent, and equal to the closed form."""

import dataclasses
import json

import pytest
import small

from dsjax.config import load
from dsjax.inference import decode_bench as bench
from dsjax.planning.counts import kv_cache_bytes_per_token


@pytest.mark.slow
def test_figures_are_complete_and_agree(monkeypatch):
    for name, value in {"NEW": 4, "SHORT": 8, "LONG": 40, "PREFIX": 128}.items():
        monkeypatch.setattr(bench, name, value)
    config = small.config(small.MODEL)
    config = dataclasses.replace(config, monitor=dataclasses.replace(config.monitor, compile_cache=None))
    figures = bench.decode_bench(config, (1, 2), repeats=1)
    assert json.loads(json.dumps(figures)) == figures
    for batch in (1, 2):
        assert figures[f"batch_{batch}"]["tokens_per_second"] > 0
        assert figures[f"batch_{batch}"]["tokens_per_processor_second"] > 0
    assert figures["cache_bytes_per_token"] == figures["cache_bytes_per_token_closed_form"]["mla"] == 2 * (16 + 8) * 4
    for times in figures["step_milliseconds"].values():
        assert times["growth"] == pytest.approx(times["40_cached"] / times["8_cached"], rel=2e-3)
        assert times["8_cached_in_its_own_bucket"] > 0
    prefix = figures["prefill_128_tokens"]
    assert prefix["times_faster"] == pytest.approx(prefix["cold_seconds"] / prefix["cached_seconds"], rel=2e-3)


def test_bytes_of_a_token_against_other_attentions(repository):
    v3 = load(str(repository / "configs" / "deepseek_v3.py")).model
    # 128 heads, or 8 groups, with keys of 192 and values of 128, in 61 layers of BF16.
    assert bench.cache_bytes(v3) == {"mla": 70_272, "mha": 61 * 128 * 320 * 2, "gqa": 61 * 8 * 320 * 2}
    assert bench.cache_bytes(v3)["mla"] == kv_cache_bytes_per_token(v3)
    assert bench.cache_bytes(small.MODEL, 4)["gqa"] == bench.cache_bytes(small.MODEL, 4)["mha"]  # two heads only
