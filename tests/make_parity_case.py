"""Makes a parity case: a tiny random checkpoint and what Hugging Face transformers computes from it.

    python tests/make_parity_case.py CONFIG_JSON OUT_DIR [--seed N] [--batch 2] [--length 24] [--search-seeds N] [--mtp]

CONFIG_JSON is any config of the family that transformers knows, in either dialect, small enough for FP32 on a CPU.
OUT_DIR gets config.json and model.safetensors as `save_pretrained` writes them, config.hub_style.json (V2 and V3: the
same in the published vocabulary), golden.safetensors (inputs, logits, activations, routing, loss, gradients under
on-disk names, a greedy continuation, with --mtp the losses of multi-token prediction) and meta.json (margins of the
closest decisions, the noise between transformers' own kernels). Needs `pip install dsjax[parity]`.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

try:
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    sys.exit(f"making a parity case needs torch and transformers: pip install dsjax[parity] ({error})")

PROMPT, NEW_TOKENS = 8, 20
MTP_WEIGHT = 0.3
# A decision closer than this may fall either way in another implementation.
ROUTER_MARGIN, GREEDY_MARGIN = 1e-4, 2e-3
ALL_GRADIENTS_BELOW = 100_000  # parameters; above, only experts 0 and 3 keep theirs
MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")
HUB_CHOICES = {
    "deepseek_v2": {"scoring_func": "softmax"},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
Tensors = dict[str, torch.Tensor]


class Mistake(Exception):
    """A user's mistake, told in one sentence."""


class MTP(nn.Module):
    """Multi-token prediction of depth 1 around one more layer of the model [V3 §2.2]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        config, last = model.config, model.model.layers[-1]
        if not hasattr(last.mlp, "gate"):
            raise Mistake("--mtp needs a last layer with experts, for MTP's layer is one like it")
        size, norm = config.hidden_size, type(model.model.norm)
        self.enorm, self.hnorm = (norm(size, eps=config.rms_norm_eps) for _ in range(2))
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = type(last)(config, config.num_hidden_layers - 1)
        self.norm = norm(size, eps=config.rms_norm_eps)

    def forward(self, model: nn.Module, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Normalised states that predict token i+2, from hidden states of tokens 0..i and the tokens 1..i+1."""
        embedded = model.model.embed_tokens(tokens[:, 1:])
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden[:, :-1])], dim=-1))
        length = x.shape[1]
        rope = model.model.rotary_emb(x, position_ids=torch.arange(length)[None])
        mask = torch.full((length, length), -math.inf).triu(1)[None, None]
        x = self.block(x, attention_mask=mask, position_embeddings=rope, past_key_values=None)
        return self.norm(x)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG_JSON")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="made anew; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--batch", type=int, default=2, help="sequences (default 2)")
    parser.add_argument("--length", type=int, default=24, help="tokens of each (default 24)")
    parser.add_argument(
        "--search-seeds",
        type=int,
        default=1,
        metavar="N",
        help=f"take the first of N seeds whose decisions are {ROUTER_MARGIN:g} (routing) and {GREEDY_MARGIN:g} "
        "(greedy tokens) apart; 1, the default, takes the seed as it is",
    )
    parser.add_argument("--mtp", action="store_true", help="add a module of multi-token prediction and its losses")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        make(options)
    except Mistake as mistake:
        sys.exit(f"{parser.prog}: {mistake}")


def make(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise Mistake(f"{options.out} exists already; remove it or name another directory")
    if options.length < PROMPT or options.batch < 1 or options.search_seeds < 1:
        raise Mistake(f"--length must be at least {PROMPT}, --batch and --search-seeds at least 1")
    config = read_config(options.config, options.mtp)
    seed, model, mtp, golden, margins = search(config, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=options.out.name + ".", dir=options.out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp and safetensors make everything private
        save(folder, model, mtp, golden)
        meta = describe(folder, model, golden) | margins | {"case": options.out.name, "seed": seed}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for file in folder.iterdir():
            file.chmod(0o644)
        folder.rename(options.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{options.out}: seed {seed}, {meta['n_params']:,} parameters, logits of std {golden['logits'].std():.2f}, "
        + ", ".join(f"{name} {value:.1e}" for name, value in margins.items())
    )


def read_config(path: Path, mtp: bool) -> Any:
    """The transformers config of a file; without weights of MTP it must not claim any."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"cannot read {path}: {error}") from error
    kind = values.pop("model_type", None) if isinstance(values, dict) else None
    if kind not in MODEL_TYPES:
        raise Mistake(f"model_type of {path} is {kind!r}; of this family transformers has {', '.join(MODEL_TYPES)}")
    for name in ("num_mtp_layers", "quantization_config", "dtype", "torch_dtype", "auto_map"):
        values.pop(name, None)
    if kind != "youtu":
        values["num_nextn_predict_layers"] = int(mtp)
    try:
        return transformers.AutoConfig.for_model(kind, **values)
    except Exception as error:  # of many kinds, some of them its own
        raise Mistake(f"transformers refuses {path}: {' '.join(str(error).split())}") from error


def search(config: Any, options: argparse.Namespace):
    """(seed, model, MTP or None, golden, margins) of the first seed whose decisions are clear enough."""
    tried = ""
    for seed in range(options.seed, options.seed + options.search_seeds):
        model, mtp = random_model(config, seed, options.mtp)
        tokens, labels = random_texts(config.vocab_size, options.batch, options.length, seed)
        golden = compute(model, tokens, labels)
        router, token = router_margin(model, golden), greedy(model, golden)
        if mtp is not None:
            extra, margin = mtp_golden(model, mtp, tokens)
            golden, router = golden | extra, min(router, margin)
        if options.search_seeds == 1 or (router >= ROUTER_MARGIN and token >= GREEDY_MARGIN):
            return seed, model, mtp, golden, {"router_margin": router, "greedy_margin": token}
        tried += f", {seed}: {router:.0e} and {token:.0e}"
    raise Mistake(
        f"no seed has clear decisions (router and greedy margins{tried}); search more seeds or shorten the texts"
    )


def random_model(config: Any, seed: int, mtp: bool) -> tuple[Any, MTP | None]:
    """A model whose every weight differs from its initial value, norms and biases too, so that mistakes show."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    extra = MTP(model).eval() if mtp else None
    for module in (model, extra):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()] if module is not None else ():
            randomise(name, tensor.data, tied=model.config.tie_word_embeddings)
    return model, extra


def randomise(name: str, tensor: torch.Tensor, tied: bool) -> None:
    if "norm" in name:
        nn.init.normal_(tensor, 1.0, 0.25)
    elif "bias" in name:
        nn.init.normal_(tensor, 0.0, 0.15)
    elif "lm_head" in name or ("embed_tokens" in name and tied):
        nn.init.normal_(tensor, 0.0, 2 / math.sqrt(tensor.shape[-1]))
    elif "embed_tokens" in name:
        nn.init.normal_(tensor, 0.0, 1.0)
    elif tensor.ndim >= 2:
        nn.init.normal_(tensor, 0.0, (1.25 if "gate.weight" in name else 1.0) / math.sqrt(tensor.shape[-1]))


def random_texts(vocabulary: int, batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels; labels as transformers wants them: not shifted, -100 where there is nothing to predict."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (batch, length), generator=draw)
    labels = tokens.clone()
    labels[0, :3] = -100
    labels[torch.rand(labels.shape, generator=draw) < 0.1] = -100
    return tokens, labels


def compute(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """The forward and backward pass with everything that is compared."""
    found: Tensors = {}
    handles = watch(model, found)
    model.zero_grad()
    out = model(input_ids=tokens, labels=labels, use_cache=False)
    for handle in handles:
        handle.remove()
    out.loss.backward()
    found |= {"input_ids": tokens, "labels": labels, "logits": out.logits, "loss": out.loss}
    found["rope.inv_freq"] = model.model.rotary_emb.inv_freq
    return {name: tensor.detach().clone() for name, tensor in found.items()} | gradients(model)


def watch(model: Any, found: Tensors) -> list[Any]:
    """Hooks that put activations and routing into `found`."""

    def keep(name: str):
        def hook(module, inputs, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_routing(name: str):
        def hook(module, inputs, output):
            logits, weights, experts = output
            order = experts.argsort(dim=-1)
            found[name + "router_logits"] = logits
            found[name + "topk_idx_sorted"] = experts.gather(-1, order)
            found[name + "topk_weight"] = weights.gather(-1, order)

        return hook

    handles = [
        model.model.embed_tokens.register_forward_hook(keep("act.embed")),
        model.model.norm.register_forward_hook(keep("act.final_norm")),
    ]
    for index, layer in enumerate(model.model.layers):
        name = f"act.layers.{index}."
        handles.append(layer.self_attn.register_forward_hook(keep(name + "attn_out")))
        handles.append(layer.mlp.register_forward_hook(keep(name + "mlp_out")))
        handles.append(layer.register_forward_hook(keep(name + "out")))
        if hasattr(layer.mlp, "gate"):
            handles.append(layer.mlp.gate.register_forward_hook(keep_routing(name)))
    return handles


def on_disk(name: str, tensor: torch.Tensor) -> Tensors:
    """A parameter of the modules under the names that checkpoints have: experts apart, gate and up apart."""
    layer, experts, projection = name.partition("mlp.experts.")
    if not experts:
        return {name: tensor}
    found = {}
    for expert, matrix in enumerate(tensor):
        parts = {"gate_proj": 0, "up_proj": 1} if projection == "gate_up_proj" else {projection: 0}
        for part, half in zip(parts, matrix.chunk(len(parts)), strict=True):
            found[f"{layer}{experts}{expert}.{part}.weight"] = half.contiguous()
    return found


def gradients(model: Any) -> Tensors:
    every = sum(parameter.numel() for parameter in model.parameters()) < ALL_GRADIENTS_BELOW
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue  # meta.json lists it
        for published, gradient in on_disk(name, parameter.grad).items():
            if every or ".experts." not in published or published.split(".experts.")[1][:2] in ("0.", "3."):
                found["grad." + published] = gradient.clone()
    return found


def router_margin(model: Any, golden: Tensors) -> float:
    """The smallest gap between what the routers kept and what they left."""
    gates = {index: layer.mlp.gate for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")}
    gaps = [gate_margin(gate, golden[f"act.layers.{i}.router_logits"], model.config) for i, gate in gates.items()]
    return min(gaps, default=math.inf)


def gate_margin(gate: nn.Module, logits: torch.Tensor, config: Any) -> float:
    """The smallest gap of one router, over groups and experts."""
    biased = hasattr(gate, "e_score_correction_bias")
    scores = logits.sigmoid() + gate.e_score_correction_bias if biased else logits.softmax(-1)
    groups = config.n_group or 1
    if groups == 1 or not (biased or config.topk_method == "group_limited_greedy"):
        return gap(scores, config.num_experts_per_tok)
    grouped = scores.view(len(scores), groups, -1)
    group_scores = grouped.topk(2 if biased else 1, dim=-1).values.sum(-1)
    kept = group_scores.topk(config.topk_group, dim=-1).indices
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, kept, True)
    scores = grouped.masked_fill(~mask[..., None], -math.inf).flatten(1)
    return min(gap(group_scores, config.topk_group), gap(scores, config.num_experts_per_tok))


def gap(scores: torch.Tensor, kept: int) -> float:
    """The smallest distance between the last kept and the first left one, along the last dimension."""
    if kept >= scores.shape[-1]:
        return math.inf
    ordered = scores.sort(dim=-1, descending=True).values
    return (ordered[..., kept - 1] - ordered[..., kept]).min().item()


def greedy(model: Any, golden: Tensors) -> float:
    """Adds a greedy continuation of the first tokens, with cache; returns the smallest gap to the second-best token."""
    prompt = golden["input_ids"][:, :PROMPT].clone()
    ids, logits = continued(model, prompt)
    golden |= {
        "generate.prompt": prompt,
        "generate.ids": ids,
        "generate.step_logits_first": logits[0].clone(),
        "generate.step_logits_last": logits[-1].clone(),
    }
    return min(gap(step, 1) for step in logits)


def continued(model: Any, prompt: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(new tokens, logits of every step), never stopped by an end-of-text token."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences[:, prompt.shape[1] :].clone(), [step.float() for step in out.logits]


def mtp_golden(model: Any, mtp: MTP, tokens: torch.Tensor) -> tuple[Tensors, float]:
    """Losses and three gradients of training with MTP, and the smallest gap in its routing.

    Once from hidden states after the last norm, once from those before it. All tokens count: position i predicts
    token i+1, and MTP token i+2.
    """
    found, margin = {}, math.inf
    seen: Tensors = {}
    model.model.norm.register_forward_hook(lambda _, inputs, output: seen.update(before=inputs[0]))
    mtp.block.mlp.gate.register_forward_hook(lambda _, inputs, output: seen.update(router=output[0]))
    for form in ("postnorm", "prenorm"):
        model.zero_grad()
        mtp.zero_grad()
        after = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        states = mtp(model, tokens, after if form == "postnorm" else seen["before"])
        logits = model.lm_head(states)
        loss = mean_loss(logits[:, :-1], tokens[:, 2:])
        total = mean_loss(model.lm_head(after)[:, :-1], tokens[:, 1:]) + MTP_WEIGHT * loss
        total.backward()
        values = {
            "hidden": states,
            "logits": logits,
            "loss": loss,
            f"total_loss_lambda{MTP_WEIGHT}": total,
            "grad.eh_proj": mtp.eh_proj.weight.grad,
            "grad.embed_tokens": model.model.embed_tokens.weight.grad,
            "grad.lm_head": model.lm_head.weight.grad,
        }
        found |= {f"mtp.{form}.{name}": tensor.detach().clone() for name, tensor in values.items()}
        margin = min(margin, gate_margin(mtp.block.mlp.gate, seen["router"], model.config))
    return found, margin


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def mtp_tensors(model: Any, mtp: MTP) -> Tensors:
    """MTP's tensors as published: one more layer, with copies of embedding and head."""
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    found = {}
    for name, tensor in mtp.state_dict().items():
        name = "shared_head.norm.weight" if name == "norm.weight" else name.removeprefix("block.")
        found |= on_disk(prefix + name, tensor)
    found[prefix + "embed_tokens.weight"] = model.model.embed_tokens.weight.data.clone()
    found[prefix + "shared_head.head.weight"] = model.lm_head.weight.data.clone()
    return found


def save(folder: Path, model: Any, mtp: MTP | None, golden: Tensors) -> None:
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if mtp is not None:
        file = folder / "model.safetensors"
        save_file(load_file(file) | mtp_tensors(model, mtp), file, metadata={"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in sorted(golden.items())}, folder / "golden.safetensors")
    hub = hub_style(json.loads((folder / "config.json").read_text()))
    if hub is not None:
        (folder / "config.hub_style.json").write_text(json.dumps(hub, indent=1, sort_keys=True) + "\n")


def hub_style(values: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of `save_pretrained` in the vocabulary of the published checkpoints; None where there is none."""
    if values["model_type"] not in HUB_CHOICES:
        return None
    new = ("rope_parameters", "dtype", "head_dim", "qk_head_dim", "transformers_version")
    hub = {name: value for name, value in values.items() if name not in new}
    rope = dict(values["rope_parameters"])
    kind = rope.pop("rope_type")
    hub |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if kind == "default" else rope | {"type": kind}}
    return hub | HUB_CHOICES[values["model_type"]] | {"torch_dtype": "float32", "moe_layer_freq": 1, "ep_size": 1}


def kernels(model: Any) -> list[tuple[str, str]]:
    """The implementations of attention and experts, beside the eager ones, that can run `model`."""
    found = [("sdpa", "eager")]
    if any(hasattr(layer.mlp, "gate") for layer in model.model.layers):
        found.append(("eager", "batched_mm"))
        if model.config.hidden_size % 4 == 0 and model.config.moe_intermediate_size % 4 == 0:
            found.append(("eager", "grouped_mm"))  # rows in multiples of 16 bytes
    return found


@torch.no_grad()
def describe(folder: Path, model: Any, golden: Tensors) -> dict[str, Any]:
    """What meta.json says beside the margins."""
    floor = {}
    for attention, kernel in kernels(model):
        other = reload(folder, attn_implementation=attention, experts_implementation=kernel)
        floor[f"attn={attention},experts={kernel}"] = farthest(other, golden)
    whole = torch.cat([golden["generate.prompt"], golden["generate.ids"]], dim=1)
    full = model(input_ids=whole, use_cache=False).logits[:, PROMPT - 1 : -1]
    last = golden["generate.step_logits_last"]
    floor["cached_decode_vs_full_forward"] = (full[:, -1] - last).abs().max().item()
    floor["greedy_full_forward_agrees"] = bool((full.argmax(-1) == golden["generate.ids"]).all())
    if (folder / "config.hub_style.json").exists():
        hub = json.loads((folder / "config.hub_style.json").read_text())
        config = transformers.AutoConfig.for_model(hub.pop("model_type"), **hub)
        other = reload(folder, config=config, attn_implementation="eager", experts_implementation="eager")
        floor["hub_style_config_same_logits"] = farthest(other, golden) == 0.0
    return {
        "model_class": type(model).__name__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "n_params": sum(parameter.numel() for parameter in model.parameters()),
        "params_without_grad": [name for name, parameter in model.named_parameters() if parameter.grad is None],
        "attn_scaling": model.model.layers[0].self_attn.scaling,
        "rope_cos_sin_scale": model.model.rotary_emb.attention_scaling,
        "noise_floor_max_abs_logits": floor,
        **file_tables(folder),
    }


def reload(folder: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


def farthest(model: Any, golden: Tensors) -> float:
    return (model(input_ids=golden["input_ids"], use_cache=False).logits - golden["logits"]).abs().max().item()


def file_tables(folder: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of what was written."""
    tables: dict[str, Any] = defaultdict(dict)
    for key, file in (("tensors", "model.safetensors"), ("golden", "golden.safetensors")):
        with safe_open(folder / file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (not a dict)
                tensor = stored.get_slice(name)
                tables[key][name] = [tensor.get_dtype(), tensor.get_shape()]
    return dict(tables)


if __name__ == "__main__":
    main()
