"""Speculative decoding: the model's own tokens when greedy, its own distribution when drawing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dsjax.inference import Engine, PrefixCache, Sampling
from dsjax.inference import sampling as samplings
from dsjax.inference.sampling import Draws
from dsjax.inference.speculative import draft_token, verify
from dsjax.training.state import build_network

MODEL = dataclasses.replace(small.MODEL, vocab_size=12)
PROMPTS = [small.tokens(n, seed=n, vocab_size=12).tolist() for n in (3, 70, 1, 17, 9)]
ASKED = [Sampling(new, 0.0) for new in (20, 3, 33, 1, 2)]


@pytest.fixture(scope="module")
def model():
    config = small.config(MODEL)
    net = build_network(config, small.mesh())
    return config, small.weights_like(net.shapes, scale=0.5), small.weights_like(net.bias_shapes, seed=1)


@pytest.fixture(scope="module")
def speculative(model):
    return Engine(*model, slots=2, speculative=True)


@pytest.fixture(scope="module")
def plain(model):
    return Engine(*model, slots=2)


def test_greedy_tokens_are_those_without_speculation(plain, speculative):
    expected, ours = plain.generate(PROMPTS, ASKED), speculative.generate(PROMPTS, ASKED)
    for one, other in zip(expected, ours, strict=True):
        assert one.tokens == other.tokens and one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
        assert one.drafted_tokens == 0
        # A step gives a token, and another one where the draft was right (unless the limit came between them).
        steps, extra = other.drafted_tokens, other.accepted_tokens
        assert steps + extra - 1 <= len(other.tokens) - 1 <= steps + extra
    assert 0 < sum(r.accepted_tokens for r in ours) < sum(r.drafted_tokens for r in ours)


def test_stop_token_ends_a_text_in_the_middle_of_a_step(plain, speculative):
    [free] = plain.generate([PROMPTS[0]], Sampling(30, 0.0))
    for stop in set(free.tokens):
        asked = Sampling(30, 0.0, stop_tokens=(stop,))
        [ours] = speculative.generate([PROMPTS[0]], asked)
        assert ours.tokens == free.tokens[: free.tokens.index(stop) + 1] and ours.finish_reason == "stop"


def test_a_known_prefix_changes_no_draw(model, speculative):
    shared = small.tokens(150, seed=9, vocab_size=12).tolist()
    asked = Sampling(16, 1.0, seed=3)
    cached = Engine(*model, slots=2, speculative=True, prefix_cache=PrefixCache())
    first, second = (cached.generate([shared], asked)[0] for _ in range(2))
    assert (first.prompt_cache_hit_tokens, second.prompt_cache_hit_tokens) == (0, 128)
    [expected] = speculative.generate([shared], asked)
    for result in (first, second):
        assert result.tokens == expected.tokens and result.accepted_tokens == expected.accepted_tokens


def draws(count, temperature=1.0, top_k=0, top_p=1.0):
    full = lambda value, dtype: jnp.full(count, value, dtype)  # noqa: E731
    filters = (full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32))
    return Draws(*filters, full(0, jnp.float32), jnp.arange(count, dtype=jnp.uint32))


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7, "temperature": 1.5}])
def test_accepted_or_replaced_a_token_has_the_models_distribution(asked):
    count = 40_000
    rng = np.random.default_rng(0)
    p_logits, q_logits = (jnp.asarray(rng.standard_normal(7) * 1.5, jnp.float32) for _ in range(2))
    rows = lambda logits: jnp.broadcast_to(logits[None], (count, 7))  # noqa: E731
    how, position = draws(count, **asked), jnp.full(count, 5)
    draft = draft_token(rows(q_logits), how, position)
    token, is_accepted = verify(rows(p_logits), rows(q_logits), draft, how, position)
    p, q = (
        np.asarray(jax.nn.softmax(samplings.filtered(rows(a)[:1], draws(1, **asked))))[0] for a in (p_logits, q_logits)
    )
    noise = 5 * np.sqrt(0.25 / count)
    np.testing.assert_allclose(np.bincount(draft, minlength=7) / count, q, atol=noise)
    np.testing.assert_allclose(np.bincount(token, minlength=7) / count, p, atol=noise)
    assert np.mean(is_accepted) == pytest.approx(np.minimum(p, q).sum(), abs=noise)
    assert 0.1 < np.mean(is_accepted) < 0.95 and np.abs(p - q).max() > 0.1


def test_texts_have_the_models_distribution(model):
    """All pairs of tokens that may follow a prompt, against the full forward pass."""
    config, params, bias = model
    params = jax.tree.map(lambda a: 0.7 * a, params)
    count, prompt = 2048, [3, 1, 4]
    engine = Engine(config, params, bias, slots=512, speculative=True)
    asked = [Sampling(3, 1.0, seed=s) for s in range(count)]
    texts = np.array([r.tokens[1:] for r in engine.generate([prompt] * count, asked)])
    net = build_network(config, small.mesh())
    firsts = np.array([[*prompt, a, b] for a in range(12) for b in range(12)], np.int32)
    logits = jax.jit(lambda t: net.bind(params, bias).logits(net.bind(params, bias)(t).hidden_BTD))(firsts)
    p = np.asarray(jax.nn.softmax(logits)).reshape(12, 12, 5, 12)
    second = np.einsum("a,ab->b", p[0, 0, 2], p[:, 0, 3])
    third = np.einsum("a,ab,abc->c", p[0, 0, 2], p[:, 0, 3], p[:, :, 4])
    for place, expected in enumerate((second, third)):
        frequency = np.bincount(texts[:, place], minlength=12) / count
        np.testing.assert_allclose(frequency, expected, atol=4.5 * np.sqrt(0.25 / count))
