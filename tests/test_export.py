"""A run, written as a published checkpoint, is the same model to Hugging Face transformers, without a line of ours.

Three small runs are trained and written with `dsjax convert`; transformers reads the directories with its own classes
and tokenizers, and torch does the arithmetic. Needs the extra `parity`; run with --slow.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import small

from dsjax import hub
from dsjax.__main__ import main
from dsjax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    RopeScaling,
    TrainingConfig,
)
from dsjax.data.loader import Loader
from dsjax.data.prepare import prepare
from dsjax.data.tokenizer import ByteTokenizer
from dsjax.hub import names
from dsjax.inference.generate import decode, generate
from dsjax.training.export import load_run
from dsjax.training.loop import train
from dsjax.training.monitor import read_rows
from dsjax.training.state import build_network
from dsjax.training.workdir import METRICS

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
torch.set_num_threads(1)  # the matrices are small, and JAX has threads enough
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NOISE = 2e-5  # of FP32 logits; transformers' own kernels differ by 1e-5 from each other
ROWS = 8  # sequences validated
NEW = 24  # tokens generated
EOS = ByteTokenizer.eos_id
TEXTS = ("12 squared is", " a  b \n\n\tc's ,d .", "日本 ü 🙂 e\u0301 \x00\x7f", "".join(map(chr, range(256))), "")
NOT_IN_FP8 = ("embed_tokens", "norm", "head", "mlp.gate.", "eh_proj", ".bias", "_scale_inv")
# transformers keep the experts of a layer in one tensor, and tell names accordingly.
STACKED = (
    r"experts\.\d+\.(?:(gate|up)|(down))_proj\.weight",
    lambda m: f"experts.{'gate_up' if m[1] else 'down'}_proj",
)
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}

# DeepSeek-V3 with its group limits, MTP, and YaRN over texts longer than its original context. Every matrix is whole
# blocks of 128 or fits into one, which transformers' dequantisation needs.
V3 = ModelConfig(
    hidden_size=256,
    num_hidden_layers=2,
    intermediate_size=384,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_rope_head_dim=32,
    rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=16),
    max_position_embeddings=128,
    initializer_range=0.06,
)
MODELS = {
    "v3": V3,
    "v2_lite": ModelConfig(
        hidden_size=144,
        num_hidden_layers=2,
        intermediate_size=260,
        moe_intermediate_size=40,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        q_lora_rank=None,
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707),
        max_position_embeddings=128,
        initializer_range=0.08,
        num_nextn_predict_layers=0,
    ),
    "tied_with_biases": ModelConfig(
        hidden_size=132,
        num_hidden_layers=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_interleave=False,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        initializer_range=0.08,
    ),
}


class Run(NamedTuple):
    """A finished run, and the directory that `dsjax convert` made of it in FP32."""

    directory: Path
    config: Config
    model: hub.Loaded
    published: Path

    @property
    def mtp_layer(self) -> str:
        """What the names of MTP's tensors begin with, which transformers does not use."""
        return f"model.layers.{self.config.model.num_hidden_layers}."

    def tensors(self) -> dict[str, np.ndarray]:
        """What transformers should hold: the weights in FP32 by published name, a tied head once."""
        every = dict(names.published(self.model.params, self.config.model))
        every |= names.published(self.model.router_bias, self.config.model)
        return {name: array for name, array in every.items() if not name.startswith(self.mtp_layer)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"{number} squared is {number * number}. " * (number + 5))
    return folder


@pytest.fixture(scope="module", params=MODELS)
def run(request, texts, tmp_path_factory) -> Run:
    place = tmp_path_factory.mktemp(request.param)
    config = Config(
        model=MODELS[request.param],
        mesh=MeshConfig(data=2, expert=4),
        dispatch=small.ROOMY,
        data=DataConfig(
            (f"text_files:{texts}",), sequence_length=48, validation_fraction=0.2, directory=str(place / "data")
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        training=TrainingConfig(total_steps=12, batch_size=8, bias_update_speed=0.01),
        evaluation=EvaluationConfig(sequences=ROWS),
        monitor=MonitorConfig(compile_cache=None),
        precision="fp32",
    )
    train(config, place / "run")
    return Run(place / "run", config, load_run(place / "run")[1], convert(place / "run", place / "fp32", "fp32"))


def convert(run: Path, destination: Path, dtype: str, *more: str) -> Path:
    assert main(["convert", str(run), str(destination), "--dtype", dtype, *more]) == 0
    return destination


def read(directory: Path, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a directory, and what it says of the tensors there."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True, **EAGER
    )
    return model.eval(), told


@pytest.fixture(scope="module")
def reading(run) -> tuple[Any, dict[str, Any]]:
    return read(run.published, torch.float32)


@pytest.fixture(scope="module")
def theirs(reading) -> Any:
    return reading[0]


def by_published_name(model: Any, config: ModelConfig) -> dict[str, Any]:
    """The state of transformers' model, its stacked experts taken apart, a tied head once."""
    found = {}
    for name, tensor in model.state_dict().items():
        layer, _, stack = name.rpartition("mlp.experts.")
        if stack == "gate_up_proj":
            parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True)
        else:
            parts = [(stack, tensor)]
        if not layer:
            found[name] = tensor
            continue
        for part, each in parts:
            found |= {f"{layer}mlp.experts.{expert}.{part}.weight": matrix for expert, matrix in enumerate(each)}
    if config.tie_word_embeddings:
        assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
    return found


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, Any]) -> None:
    """The same names, and under each the same numbers in the same format."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        tensor = theirs[name].contiguous()
        assert (array.dtype.name, array.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), name
        assert array.tobytes() == tensor.view(torch.uint8).numpy().tobytes(), name


def our_logits(config: Config, model: hub.Loaded, tokens_BT: np.ndarray) -> np.ndarray:
    net = build_network(config, small.mesh())

    @jax.jit
    def logits(params, bias, tokens_BT):
        bound = net.bind(params, bias)
        return bound.logits(bound(tokens_BT).hidden_BTD)

    return np.asarray(logits(model.params, model.router_bias, tokens_BT))


@torch.no_grad()
def assert_same_logits(config: Config, ours: hub.Loaded, theirs: Any) -> None:
    tokens_BT = small.tokens(4, 48, vocab_size=config.model.vocab_size)
    expected = theirs(torch.tensor(tokens_BT)).logits.numpy()
    worst = np.abs(our_logits(config, ours, tokens_BT) - expected).max()
    # Seen with `pytest -s`, or when it fails.
    print(f"logits of std {expected.std():.2f}, worst difference {worst:.1e}")
    assert expected.std() > 0.5 and worst <= NOISE


def test_transformers_miss_no_tensor_and_know_all_but_mtp(run, reading):
    told = reading[1]
    written = load_file(run.published / "model.safetensors")
    mtp = {re.sub(*STACKED, name) for name in written if name.startswith(run.mtp_layer)}
    assert bool(mtp) == bool(run.config.model.num_nextn_predict_layers)
    assert set(told["unexpected_keys"]) == mtp
    assert not told["missing_keys"] and not told["mismatched_keys"] and not told["error_msgs"]


def test_weights_of_transformers_are_the_weights_of_the_run(run, theirs):
    ours = run.tensors()
    assert all(array.any() for array in ours.values())  # biases too have been trained
    assert_same_bits(ours, by_published_name(theirs, run.config.model))


def test_logits_of_transformers_are_ours(run, theirs):
    assert_same_logits(run.config, run.model, theirs)


@torch.no_grad()
def test_validation_loss_of_the_run_is_that_of_transformers(run, theirs):
    loader = Loader(prepare(run.config.data), run.config.data, seed=0, split="validation")
    rows_BT = torch.tensor(np.array(loader.rows(range(ROWS))), dtype=torch.int64)
    told = [row["validation_loss"] for row in read_rows(run.directory / METRICS) if "validation_loss" in row]
    assert theirs(rows_BT, labels=rows_BT).loss.item() == pytest.approx(told[-1], abs=1e-5)


def test_greedy_tokens_of_transformers_are_ours(run, theirs):
    seen = set()
    for seed in range(2):
        prompt = small.tokens(1, 12, seed=seed, vocab_size=256)
        model = run.config, small.mesh(), run.model.params, run.model.router_bias
        ours = decode(*model, prompt[0].tolist(), NEW, 0.0, 0, EOS)
        ids = torch.tensor(prompt)
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        assert out[0, 12:].tolist() == ours + [EOS] * (len(ours) < NEW)
        seen.update(ours)
    assert len(seen) > 6  # not one token for ever


def test_published_tokenizer_of_a_run_over_bytes_gives_bytes(run):
    ours, published = ByteTokenizer(), transformers.AutoTokenizer.from_pretrained(run.published)
    for text in TEXTS:
        assert published.encode(text) == published(text)["input_ids"] == ours.encode(text)
        assert published.decode(ours.encode(text)) == text
    assert (published.eos_token_id, len(published)) == (ours.eos_id, ours.vocab_size)
    config = transformers.AutoConfig.from_pretrained(run.published)
    assert config.eos_token_id == ours.eos_id


def test_transformers_generate_the_text_that_dsjax_generates(run, theirs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.published)
    words = tokenizer("12 squared", return_tensors="pt")
    ids = theirs.generate(**words, max_new_tokens=NEW, do_sample=False)[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == generate(str(run.directory), "12 squared", NEW, 0.0, 0) != "12 squared"


def test_bf16_of_transformers_is_ours_rounded_once(run, tmp_path):
    model, _ = read(convert(run.directory, tmp_path / "bf16", "bf16"), "auto")
    assert model.dtype == torch.bfloat16
    rounded = {
        name: array if name.endswith("e_score_correction_bias") else array.astype(ml_dtypes.bfloat16)
        for name, array in run.tensors().items()
    }
    assert_same_bits(rounded, by_published_name(model, run.config.model))


def test_what_transformers_write_is_the_model_again(run, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "again")
    assert "rope_parameters" in json.loads((tmp_path / "again" / "config.json").read_text())  # the other dialect
    again = hub.load(tmp_path / "again")
    without_mtp = {"num_nextn_predict_layers": 0}  # transformers drop it
    assert again.config == dataclasses.replace(run.config.model, **without_mtp)
    kept = {name: tree for name, tree in run.model.params.items() if name != "mtp"}
    bias = {name: tree for name, tree in run.model.router_bias.items() if name != "mtp"}
    small.assert_trees_close(again.params, kept, 0)
    small.assert_trees_close(again.router_bias, bias, 0)


def dequantised(stored: dict[str, Any]) -> dict[str, Any]:
    """Block FP8 multiplied out in FP32, in torch alone."""
    found = {}
    for name, tensor in stored.items():
        scale = stored.get(name + "_scale_inv")
        if scale is not None:
            rows, columns = tensor.shape
            spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
            found[name] = tensor.float() * spread
        elif not name.endswith("_scale_inv"):
            found[name] = tensor.float()
    return found


@pytest.fixture(params=["float32", "ue8m0"])
def fp8(request, run, tmp_path) -> Path:
    """The run in block FP8, with scales that are any FP32 numbers or powers of two."""
    return convert(run.directory, tmp_path / request.param, "fp8", "--scale-format", request.param)


def test_fp8_means_to_torch_what_it_means_to_us(fp8):
    stored, model = load_file(fp8 / "model.safetensors"), hub.load(fp8, dtype="float32")
    ours = dict(names.published(model.params, model.config)) | dict(names.published(model.router_bias, model.config))
    copies = names.copies(model.config)
    assert_same_bits(ours, {name: each for name, each in dequantised(stored).items() if name not in copies})
    quantised = {name for name, each in stored.items() if each.dtype == torch.float8_e4m3fn}
    assert quantised == {name for name in stored if not any(part in name for part in NOT_IN_FP8)}
    scales = torch.cat([each.flatten() for name, each in stored.items() if name.endswith("_scale_inv")])
    assert torch.equal(scales, torch.exp2(torch.log2(scales).round())) == (fp8.name == "ue8m0")


# transformers 5.23 dequantises only matrices of whole blocks, or of one.
@pytest.mark.parametrize("run", ["v3"], indirect=True)
def test_transformers_dequantise_fp8_to_the_weights_that_we_compute_with(run, fp8):
    pytest.importorskip("accelerate")  # without which transformers read no FP8
    theirs, ours = read(fp8, torch.float32)[0].float(), hub.load(fp8, dtype="float32")
    assert_same_bits(run._replace(model=ours).tensors(), by_published_name(theirs, run.config.model))
    assert_same_logits(run.config, ours, theirs)
