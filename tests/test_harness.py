"""lm-evaluation-harness's three questions, answered as its API describes them."""

import dataclasses
from types import SimpleNamespace

import pytest
import small

from dsjax.config import ConfigError
from dsjax.data.tokenizer import ByteTokenizer
from dsjax.inference import Engine, Sampling
from dsjax.inference.harness import answers, continuation_scores, harness_model, text_score
from dsjax.inference.scoring import score
from dsjax.training.state import build_network

ROOM = 40
MODEL = dataclasses.replace(small.MODEL, vocab_size=264, num_nextn_predict_layers=0, max_position_embeddings=ROOM)


@pytest.fixture(scope="module")
def engine():
    config = small.config(MODEL)
    net = build_network(config, small.mesh())
    weights = small.weights_like(net.shapes, scale=0.5), small.weights_like(net.bias_shapes, seed=1)
    return Engine(config, *weights, slots=2, tokenizer=ByteTokenizer())


def log_prob(engine, tokens, count):
    return score(engine, [tokens], [count])[0].log_probs.sum()


def test_continuations_are_scored_after_their_contexts(engine):
    eos, long = ByteTokenizer.eos_id, "z" * 60
    pairs = [("ab", " cd"), ("", "x"), (long, "yy")]
    ours = [value for value, _ in continuation_scores(engine, pairs)]
    expected = [
        log_prob(engine, [eos, *b"ab cd"], 3),
        log_prob(engine, [eos, *b"x"], 1),
        log_prob(engine, [*b"z" * (ROOM - 1), *b"yy"], 2),  # the beginning is lost
    ]
    assert ours == pytest.approx(expected, abs=1e-4)
    [greedy] = engine.generate([[eos, *b"ab"]], Sampling(1, 0.0))
    if greedy.tokens[0] < 128:
        assert continuation_scores(engine, [("ab", chr(greedy.tokens[0]))])[0][1]
    assert not all(is_greedy for _, is_greedy in continuation_scores(engine, [("ab", "c"), ("ab", "d")]))


@pytest.mark.parametrize("length", [0, 5, ROOM, ROOM + 1, 2 * ROOM + 7])
def test_every_token_of_a_text_is_scored_once(engine, length):
    text = ("abcdefg" * 30)[:length]
    tokens = [ByteTokenizer.eos_id, *text.encode()]
    expected, done = 0.0, 1
    while done < len(tokens):
        end = min(done + ROOM - 1, len(tokens) - 1) + 1
        window = tokens[max(0, end - ROOM - 1) : end]
        expected += log_prob(engine, window, end - done)
        done = end
    assert text_score(engine, text) == pytest.approx(expected, abs=1e-3) and (expected < 0) == (length > 0)


def test_answers_stop_where_the_task_says(engine):
    [free] = answers(engine, [("ab", {"max_gen_toks": 12})])
    assert free == engine.generate(["ab"], Sampling(12, 0.0))[0].text
    end = next(c for c in free[1:] if c.isprintable())
    [cut, long] = answers(engine, [("ab", {"max_gen_toks": 12, "until": [end]}), ("q" * 90, {"max_gen_toks": 12})])
    assert cut == free[: free.index(end)] and isinstance(long, str)


@pytest.mark.parametrize(
    "context, wanted, kept, new, told",
    [
        (10, 12, 10, 12, None),
        (10, 30, 10, 30, None),
        (10, ROOM - 1, 10, 30, "0 of 1 contexts lose their beginning, and 1 answers may"),
        (10, ROOM, 10, 30, "0 of 1"),
        (10, 9999, 10, 30, "0 of 1"),
        (39, 12, 28, 12, "1 of 1 contexts lose their beginning, and 0 answers may"),
        (90, 12, 28, 12, "1 of 1"),
        (90, 9999, 20, 20, "1 of 1 contexts lose their beginning, and 1 answers may"),
    ],
)
def test_long_answers_get_what_the_context_leaves_and_never_less_than_half(capsys, context, wanted, kept, new, told):
    asked = []

    def generate(prompts, samplings):
        asked.extend((prompt, one.max_new_tokens) for prompt, one in zip(prompts, samplings, strict=True))
        return [SimpleNamespace(text="")] * len(prompts)

    engine = SimpleNamespace(tokenizer=ByteTokenizer(), config=SimpleNamespace(model=MODEL), generate=generate)
    text = ("0123456789" * 9)[:context]
    answers(engine, [(text, {"max_gen_toks": wanted})])
    assert asked == [(list(text.encode())[-kept:], new)]
    warned = capsys.readouterr().err
    assert warned.count("WARNING") == (told is not None) and (told or "") in warned


def test_model_speaks_the_harness_api_or_says_what_is_missing(engine):
    try:
        from lm_eval.api.instance import Instance
    except ImportError:
        with pytest.raises(ConfigError, match=r"pip install 'dsjax\[eval\]'"):
            harness_model(engine)
        return
    model = harness_model(engine)
    asked = [Instance("loglikelihood", {}, ("ab", " cd"), 0)]
    assert model.loglikelihood(asked) == continuation_scores(engine, [("ab", " cd")])
    assert model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abc",), 0)]) == [
        text_score(engine, "abc")
    ]
    assert model.generate_until([Instance("generate_until", {}, ("ab", {"max_gen_toks": 3}), 0)]) == answers(
        engine, [("ab", {"max_gen_toks": 3})]
    )
