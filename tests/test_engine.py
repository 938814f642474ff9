"""The engine: many requests give what each would alone; sampling is what it says; mistakes are sentences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from dsjax.config import ConfigError
from dsjax.data.tokenizer import ByteTokenizer
from dsjax.inference import Engine, PrefixCache, Sampling
from dsjax.inference import sampling as samplings
from dsjax.inference.decoding import STOPS, bucket
from dsjax.inference.sampling import Draws
from dsjax.training.state import build_network

MODEL = dataclasses.replace(small.MODEL, vocab_size=264, num_nextn_predict_layers=0)
PROMPTS = [small.tokens(n, seed=n, vocab_size=250).tolist() for n in (3, 40, 1, 17, 90, 5, 64)]
ASKED = [Sampling(new, 0.0) for new in (20, 3, 33, 1, 9, 50, 12)]


def weights(config):
    net = build_network(config, small.mesh())
    return small.weights_like(net.shapes, scale=0.5), small.weights_like(net.bias_shapes, seed=1)


@pytest.fixture(scope="module")
def config():
    return small.config(MODEL)


@pytest.fixture(scope="module")
def model(config):
    return weights(config)


@pytest.fixture(scope="module")
def engine(config, model):
    return Engine(config, *model, slots=2, tokenizer=ByteTokenizer())


@pytest.fixture(scope="module")
def likeliest(config, model):
    """The continuation of a prompt by the full forward pass, greedy; and the log-probabilities."""
    net = build_network(config, small.mesh())

    @jax.jit
    def run(tokens_BT):
        bound = net.bind(*model)
        return jax.nn.log_softmax(bound.logits(bound(tokens_BT).hidden_BTD))

    def follow(prompt, tokens):
        sequence = np.zeros((1, 128), np.int32)
        sequence[0, : len(prompt) + len(tokens)] = prompt + tokens
        log_probs = np.asarray(run(sequence))[0, len(prompt) - 1 : len(prompt) + len(tokens) - 1]
        return log_probs.argmax(-1).tolist(), log_probs[np.arange(len(tokens)), tokens]

    return follow


def test_seven_requests_over_two_slots_equal_the_full_pass(engine, likeliest):
    finished = []
    results = engine.generate(PROMPTS, ASKED, on_result=lambda index, result: finished.append(index))
    assert sorted(finished) == list(range(7)) and finished.index(3) < finished.index(5)  # the short one first
    for prompt, asked, result in zip(PROMPTS, ASKED, results, strict=True):
        tokens, log_probs = likeliest(prompt, result.tokens)
        assert result.prompt == prompt and result.tokens == tokens
        np.testing.assert_allclose(result.log_probs, log_probs, atol=1e-4)
        ended = result.tokens[-1] == ByteTokenizer.eos_id
        assert (result.finish_reason == "stop") == ended and (ended or len(tokens) == asked.max_new_tokens)
        assert (result.prompt_cache_hit_tokens, result.prompt_cache_miss_tokens) == (0, len(prompt))


def test_draws_of_a_seed_do_not_depend_on_the_company(engine):
    asked = [Sampling(12, 1.0, seed=s) for s in range(5)]
    together = engine.generate([[5, 6, 7]] * 5, asked)
    assert len({tuple(r.tokens) for r in together}) == 5
    for one, result in zip(asked, together, strict=True):
        assert engine.generate([[5, 6, 7]], one)[0].tokens == result.tokens


def test_results_are_the_same_on_a_mesh_of_eight(config, model, engine):
    on_mesh = Engine(config, *model, small.mesh(data=2, expert=4), slots=3, tokenizer=ByteTokenizer())
    assert on_mesh.slots == 8
    for asked in (ASKED, [dataclasses.replace(s, temperature=1.0, top_p=0.9, seed=3) for s in ASKED]):
        ours = [r.tokens for r in on_mesh.generate(PROMPTS, asked)]
        assert ours == [r.tokens for r in engine.generate(PROMPTS, asked)]


def test_newer_parameters_are_used_and_nothing_compiles_anew(config, model):
    engine = Engine(config, *model, slots=2)
    before = engine.generate([[1, 2, 3]], Sampling(8, 0.0))[0]
    compiled = engine.programs.decode._cache_size()
    params = jax.tree.map(lambda a: a * 1.3, model[0])
    engine.update(params, model[1])
    after = engine.generate([[1, 2, 3]], Sampling(8, 0.0))[0]
    assert before.tokens != after.tokens and engine.programs.decode._cache_size() == compiled
    assert after.tokens == Engine(config, params, model[1], slots=2).generate([[1, 2, 3]], Sampling(8, 0.0))[0].tokens


def test_stop_tokens_and_strings_end_a_text(engine):
    [free] = engine.generate([[10, 11]], Sampling(40, 1.0, seed=2))
    third = free.tokens[2]
    [stopped] = engine.generate([[10, 11]], Sampling(40, 1.0, seed=2, stop_tokens=(third,)))
    assert stopped.tokens == free.tokens[: free.tokens.index(third) + 1] and stopped.finish_reason == "stop"
    assert engine.tokenizer.decode(stopped.tokens[:-1]) == stopped.text
    letters = [i for i, token in enumerate(free.tokens) if 32 < token < 127]
    at = letters[len(letters) // 2]
    string = chr(free.tokens[at])
    [cut] = engine.generate([[10, 11]], Sampling(40, 1.0, seed=2, stop=(string, "never there")))
    assert string not in cut.text and cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: free.tokens.index(ord(string)) + 1] and len(cut.log_probs) == len(cut.tokens)


def test_stream_gives_the_same_text_in_pieces_and_may_be_left(engine):
    asked = Sampling(40, 1.0, seed=4, stop=("zz",))
    pieces = list(engine.stream("ab", asked))
    assert "".join(pieces) == engine.generate(["ab"], asked)[0].text and len(pieces) > 2
    for piece in engine.stream("ab", asked):
        assert piece
        break
    assert engine.complete("ab", max_new_tokens=5) == engine.generate(["ab"], Sampling(5, 0.0))[0].text


def test_calls_within_a_call_are_refused_and_cut_no_text(engine):
    asked, other = Sampling(40, 0.0), Sampling(3, 0.0)
    whole, refusal = engine.complete("ab", max_new_tokens=40), "in the middle of another call"
    pieces = []
    for piece in engine.stream("ab", asked):
        pieces.append(piece)
        with pytest.raises(RuntimeError, match=refusal):
            engine.generate(["cd"], other)
    assert "".join(pieces) == whole and len(pieces) > 2
    first = engine.stream("ab", asked)
    with pytest.raises(RuntimeError, match=refusal):
        list(zip(first, engine.stream("cd", other), strict=False))
    assert whole.endswith("".join(first))
    with pytest.raises(RuntimeError, match=refusal):
        engine.generate(["cd"], other, on_result=lambda index, result: engine.complete("ab"))
    assert engine.complete("ab", max_new_tokens=40) == whole


def test_cache_grows_by_buckets():
    assert [bucket(n) for n in (1, 64, 65, 128, 129, 4096, 4097)] == [64, 64, 128, 128, 256, 4096, 8192]


@pytest.mark.parametrize(
    "prompt, changes, sentence",
    [
        ([1], {"max_new_tokens": 5000}, "1 tokens and 5000 new ones exceed max_position_embeddings = 4096"),
        ([264], {}, "tokens outside the model's vocabulary of 264"),
        ([1], {"stop_tokens": tuple(range(STOPS))}, f"may have {STOPS} stop tokens, but has {STOPS + 1}"),
    ],
)
def test_request_that_cannot_be_is_told_and_leaves_nothing_behind(engine, prompt, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        engine.generate([[1], prompt], Sampling(**{"max_new_tokens": 2, **changes}))
    assert len(engine.generate([[1]], Sampling(2))) == 1


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1.0, but must be 0 or a positive number"),
        ({"top_k": 0}, "top_k is 0, but must be at least 1, or None"),
        ({"top_p": 0.0}, "top_p is 0.0, but must be above 0 and at most 1"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, but must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, but must be a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot', but must be a number"),
        ({"temperature": 10**400}, r"but must be 0 or a positive number up to 1e\+38"),
        ({"top_k": 1.5}, "top_k is 1.5, but must be a whole number, or None"),
        ({"top_p": None}, "top_p is None, but must be a number"),
        ({"seed": "1"}, "seed is '1', but must be a whole number"),
        ({"stop_tokens": (1.0,)}, r"stop_tokens is \(1.0,\), but must be a list or tuple of tokens"),
        ({"stop": "end"}, "stop is 'end', but must be a list or tuple of texts"),
        ({"stop": (1,)}, r"stop is \(1,\), but must be a list or tuple of texts"),
    ],
)
def test_sampling_that_cannot_be_is_told(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Sampling(**changes)


def test_numbers_of_numpy_are_numbers(engine):
    theirs = Sampling(np.int64(4), np.float32(0.5), np.int32(10**9), np.float64(0.9), seed=np.uint32(3))
    ours = Sampling(4, 0.5, 10**9, 0.9, seed=3)
    assert engine.generate([[1]], theirs)[0].tokens == engine.generate([[1]], ours)[0].tokens
    assert engine.generate([[1]], dataclasses.replace(ours, top_k=10**12))[0].tokens  # more than an int32


def test_engine_without_what_is_asked_of_it_says_so(config, model):
    engine = Engine(config, *model)
    for prompt, asked in (("text", Sampling()), ([1], Sampling(stop=("a",))), ([], Sampling())):
        with pytest.raises(ConfigError, match="need"):
            engine.generate([prompt], asked)
    with pytest.raises(ConfigError, match="2 prompts, but 1 samplings"):
        engine.generate([[1], [2]], [Sampling()])
    with pytest.raises(ConfigError, match="needs a model with an MTP module"):
        Engine(config, *model, speculative=True)


def draws(rows, **values):
    base = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0} | values
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32)
    return Draws(
        *(jnp.broadcast_to(jnp.asarray(v, kind), (rows,)) for v, kind in zip(base.values(), kinds, strict=True))
    )


def kept(p, top_k, top_p, min_p):
    """The filters as they are defined, one after the other, on a list of probabilities."""
    order = sorted(range(len(p)), key=lambda i: -p[i])
    chosen = order[:top_k] if top_k else order
    total, taken = sum(p[i] for i in chosen), []
    for i in chosen:
        if sum(p[j] for j in taken) / total < top_p:
            taken.append(i)
    return {i for i in taken if p[i] >= min_p * max(p)}


@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (5, 0.7, 0.1), (99, 1.0, 0.0)]
)
def test_filters_keep_what_their_definitions_keep(top_k, top_p, min_p):
    logits = np.random.default_rng(0).standard_normal((6, 11)).astype(np.float32) * 2
    asked = draws(6, temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = np.asarray(jax.nn.softmax(samplings.filtered(jnp.asarray(logits), asked)))
    for row, p in zip(ours, np.asarray(jax.nn.softmax(jnp.asarray(logits) / 0.7)), strict=True):
        expected = kept(p.tolist(), top_k, top_p, min_p)
        assert set(np.flatnonzero(row)) == expected
        np.testing.assert_allclose(row[list(expected)], p[list(expected)] / p[list(expected)].sum(), rtol=1e-4)


def test_rows_of_a_batch_are_filtered_each_by_its_own():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((3, 7)), jnp.float32)
    asked = draws(3, temperature=jnp.array([0.0, 1.0, 2.0]), top_k=jnp.array([0, 1, 0]))
    p = np.asarray(jax.nn.softmax(samplings.filtered(logits, asked)))
    best = np.argmax(logits, -1)
    assert p[0, best[0]] == p[1, best[1]] == 1
    np.testing.assert_allclose(p[2], jax.nn.softmax(logits[2] / 2), rtol=1e-5)


def test_frequencies_of_draws_are_the_probabilities():
    count = 20_000
    logits = jnp.asarray([[0.0, 1.0, 2.0, -1.0]], jnp.float32)
    rows = jnp.broadcast_to(logits, (count, 4))
    tokens, log_probs = samplings.draw(
        rows, draws(count, temperature=0.8, seed=jnp.arange(count)), jnp.zeros(count, int)
    )
    p = np.asarray(jax.nn.softmax(logits[0] / 0.8))
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / count, p, atol=5 * np.sqrt(0.25 / count))
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits[0])[tokens], atol=1e-5)


@pytest.mark.slow
def test_prompts_that_begin_alike_are_computed_once(config, model, engine):
    shared = small.tokens(200, seed=9, vocab_size=250).tolist()
    prompts = [shared + [i, i + 1] for i in range(3)] + [shared[:128], shared[:129]]
    plain = [r.tokens for r in engine.generate(prompts, Sampling(6, 0.0))]
    cached = Engine(config, *model, slots=2, tokenizer=ByteTokenizer(), prefix_cache=PrefixCache())
    results = [cached.generate([p], Sampling(6, 0.0))[0] for p in prompts]
    assert [r.tokens for r in results] == plain
    assert [r.prompt_cache_hit_tokens for r in results] == [0, 192, 192, 64, 128]
    assert all(r.prompt_cache_hit_tokens + r.prompt_cache_miss_tokens == len(r.prompt) for r in results)
    other = cached.generate([prompts[0]], Sampling(6, 0.0), salt="someone else")[0]
    assert other.prompt_cache_hit_tokens == 0 and other.tokens == plain[0]
    cached.update(jax.tree.map(lambda a: a * 1.1, model[0]), model[1])
    assert cached.generate([prompts[0]], Sampling(6, 0.0))[0].prompt_cache_hit_tokens == 0
    cached.update(*model)
    assert cached.generate([prompts[0]], Sampling(6, 0.0))[0].prompt_cache_hit_tokens == 192
