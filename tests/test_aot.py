"""Ahead-of-time plans: what is read from compiled text, what work is counted, and which slices there are."""

import dataclasses
import importlib.util
import json
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import small
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from dsjax.aot import told, topology
from dsjax.aot.compile import compile_step
from dsjax.aot.hlo import Program, array_bytes, readable
from dsjax.aot.work import flops_per_device
from dsjax.config import ConfigError, DispatchConfig
from dsjax.model import dispatch as travel
from dsjax.model.causal import splash_attention
from dsjax.numerics.grouped_matmul import Groups
from dsjax.numerics.linear import linear
from dsjax.numerics.recipe import recipe
from dsjax.planning import counts, hardware
from dsjax.planning.plan import make_plan

# The forms that the TPU and the GPU compiler write: a loop that says how often it turns, one whose condition holds
# the bound, one with a traced bound, one inside shard_map; collectives that wait and that do not; four group formats.
TEXT = """\
HloModule jit_train_step, is_scheduled=true

%known_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %ag = f32[8,4]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%bounded_condition (p: (s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%bounded_body (p: (s32[])) -> (s32[]) {
  %ag.start = ((bf16[2,4]{1,0}, bf16[2]{0}), (bf16[16,4]{1,0}, bf16[16]{0})) all-gather-start(%x, %y), replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}
  %ag.done = (bf16[16,4]{1,0}, bf16[16]{0}) all-gather-done(%ag.start)
}

%traced_condition (p: (s32[], s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%rounds_body (p: (s32[])) -> (s32[]) {
  %never = f32[1000]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

%traced_body (p: (s32[])) -> (s32[]) {
  %rs = f32[4,4]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, to_apply=%add
  %inner = (s32[], f32[8,4]) while(%t), condition=%traced_condition, body=%known_body, backend_config={"known_trip_count":{"n":"3"}}
  %rounds = (s32[]) while(%t), condition=%traced_condition, body=%rounds_body, metadata={op_name="jit(train_step)/while/body/jvp()/while/body/feed_forward/shard_map/while"}
}

%all-reduce-scatter.1 (p: f32[6]) -> f32[2] {
  %ar = f32[6]{0} all-reduce(%p), replica_groups={{0,1,2}}, to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %ar = f32[10]{0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %w = (s32[]) while(%t), condition=%bounded_condition, body=%bounded_body
  %v = (s32[]) while(%t), condition=%traced_condition, body=%traced_body, metadata={op_name="jit(train_step)/while"}
  %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %r = ((f32[12,2], f32[12,2], s64[4]), f32[12,2]) ragged-all-to-all-start(%a, %b), replica_groups={{0,2,4,6}}
  %aa = f32[8]{0} all-to-all(%p), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}
  %cp = u8[64]{0} collective-permute(%p), source_target_pairs={{0,3},{3,0}}
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loops_turn():
    found = {(one.kind, one.members): (count, one.bytes_sent) for one, count in Program(TEXT, 7).collectives.items()}
    assert found == {
        ("all-gather", (0, 1, 2, 3)): (3 * 7, 8 * 4 * 4 * 3 / 4),
        ("all-gather", tuple(range(8))): (5, (16 * 4 + 16) * 2 * 7 / 8),
        ("reduce-scatter", (0, 4)): (7, 4 * 4 * 4 * 1),
        ("reduce-scatter", (0, 1, 2)): (1, 2 * 4 * 2),
        ("all-reduce", tuple(range(8))): (1, 2 * 40 * 7 / 8),
        ("ragged-all-to-all", (0, 2, 4, 6)): (1, 12 * 2 * 4 * 3 / 4),
        ("all-to-all", (0, 4)): (1, 8 * 4 / 2),
        ("collective-permute", (0, 3)): (1, 64),
    }


def test_largest_arrays_are_named_once():
    largest = Program(TEXT, 7).largest_arrays(2)
    assert [one.shape for one in largest] == ["f32[1000]", "f32[8,4]"]


@pytest.mark.parametrize(
    "text, size",
    [("f32[2,3]{1,0}", 24), ("(bf16[4]{0}, s32[])", 12), ("f8e4m3fn[128,2]", 256), ("pred[8]", 8), ("s4[6]", 3)],
)
def test_bytes_of_a_type(text, size):
    assert array_bytes(text) == size


def test_names_of_operations_read_like_the_model():
    name = "jit(train_step)/while/body/transpose(jvp())/while/body/closed_call/checkpoint/feed_forward/shard_map/add"
    assert readable(name) == "feed_forward/add, backward"
    assert readable("jit(train_step)/while/body/jvp(mtp)/attention/dot_general") == "mtp/attention/dot_general"
    assert readable("jit(train_step)/transpose(jvp(mtp))/every_round/while/body/mul") == "mtp/mul, backward"


def test_a_program_of_the_cpu_compiler_is_read_too():
    mesh = small.mesh(1, 2, 4)

    def layer(x, w):
        whole = lax.all_gather(w, "fsdp", axis=0, tiled=True)
        return jnp.tanh(x @ whole), None

    def local(x, ws):
        return lax.psum(lax.scan(layer, x, ws)[0], "expert")

    spec = PartitionSpec(None, "fsdp")
    run = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(), check_vma=False)
    )
    text = run.lower(jnp.ones((3, 16)), jnp.ones((5, 16, 16))).compile().as_text()
    found = {one.kind: (count, one.bytes_sent) for one, count in Program(text, 1).collectives.items()}
    assert found == {"all-gather": (5, 16 * 16 * 4 / 2), "all-reduce": (1, 2 * 3 * 16 * 4 * 3 / 4)}


def test_work_counts_loops_branches_and_shards():
    mesh = small.mesh(2, 1, 2)
    w = jnp.ones((8, 8))

    def local(x):
        return lax.fori_loop(0, 3, lambda _, y: y @ w, x)

    def run(x, n, sizes):
        x = lax.scan(lambda y, _: (y @ w, None), x, length=5)[0]
        x = lax.fori_loop(0, n, lambda _, y: y @ w, x)
        x = lax.cond(n > 1, lambda y: y @ w @ w, lambda y: y @ w, x)
        x = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(x)
        return lax.ragged_dot(x, jnp.ones((2, 8, 10)), sizes)

    program = jax.make_jaxpr(run)(jnp.ones((4, 8)), 2, jnp.array([3, 1])).jaxpr
    product = 2 * 4 * 8 * 8
    outside, inside = (5 + 7 + 2) * product + 2 * 4 * 8 * 10, 3 * product / 2
    assert flops_per_device(program, 4, while_trips=7) == outside / 4 + inside


def test_work_counts_what_a_kernel_writes_and_nothing_that_is_not_read():
    def kernel(x_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)

    def local(x):
        lax.psum(x @ x.T, "data")  # nothing reads it
        block = pl.BlockSpec((8, 8), lambda i: (i, 0))
        out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return pl.pallas_call(kernel, out, grid=(2,), in_specs=[block], out_specs=block, interpret=True)(x)

    spec = PartitionSpec("data")
    run = jax.shard_map(local, mesh=small.mesh(2), in_specs=spec, out_specs=spec, check_vma=False)
    program = jax.make_jaxpr(run)(jnp.ones((32, 8))).jaxpr
    assert flops_per_device(program, 2, while_trips=1) == 2 * (2 * 8 * 8 * 8)


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("form", ["hopper", "triton", "mosaic"])
def test_work_counts_native_fp8_products(form, is_grouped):
    """Fprop, Dgrad and Wgrad of 256 rows, or of two experts' 128 each."""
    mesh, everywhere = small.mesh(), PartitionSpec()
    how = dataclasses.replace(recipe("fp8_deepseek", mesh=mesh), native=form)

    def dense(x, w):
        return linear(x, w, how)

    def grouped(x, w):
        local = lambda x, w: linear(x, w, how.after_dispatch, Groups(jnp.array([128, 128]), 128))  # noqa: E731
        return jax.shard_map(local, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)(x, w)

    def loss(x, w):
        return jnp.sum((grouped if is_grouped else dense)(x, w).astype(jnp.float32))

    x = jax.ShapeDtypeStruct((256, 512) if is_grouped else (1, 256, 512), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((2, 512, 256) if is_grouped else (512, 256), jnp.float32)
    program = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(x, w).jaxpr
    assert flops_per_device(program, 1, while_trips=1) == 3 * (2 * 256 * 512 * 256)


def test_work_of_splash_attention_is_that_of_the_blocks_it_does():
    """Of 8 x 8 blocks causality leaves 36."""
    q, v = (jax.ShapeDtypeStruct((1, 4096, 2, size), jnp.bfloat16) for size in (192, 128))
    program = jax.make_jaxpr(partial(splash_attention, scale=1.0))(q, q, v).jaxpr
    assert flops_per_device(program, 1, while_trips=0) == 2 * 36 / 64 * 2 * 4096**2 * (192 + 128)


def test_work_equals_the_compilers_count_without_loops():
    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    step = jax.jit(jax.grad(loss))
    shapes = [jax.ShapeDtypeStruct((64, 96), jnp.float32), jax.ShapeDtypeStruct((96, 64), jnp.float32)]
    traced = step.trace(shapes, jax.ShapeDtypeStruct((256, 64), jnp.float32))
    compiled = traced.lower().compile().cost_analysis()["flops"]
    assert flops_per_device(traced.jaxpr.jaxpr, 1, 1) == pytest.approx(compiled, rel=0.02)


DENSE = dataclasses.replace(
    small.MODEL,
    num_hidden_layers=2,
    first_k_dense_replace=2,
    num_nextn_predict_layers=0,
    hidden_size=64,
    vocab_size=500,
)


def test_work_of_a_dense_model_is_the_closed_form():
    """All queries of a short sequence are one block, so attention is not halved by causality."""
    config = small.config(DENSE, data=8, loss_chunk_size=16)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=64))
    step = compile_step(config, small.mesh(8), None)
    tokens = config.training.batch_size * 64 / 8
    # The backward pass of attention computes the scores again, and the product of the output with its gradient.
    model = config.model
    again = 2 * model.num_hidden_layers * model.num_attention_heads * (64 * model.qk_head_dim + model.v_head_dim)
    expected = tokens * (counts.flops_per_token(model, 64, causal=False) + again)
    assert step.flops == expected


@pytest.mark.parametrize("form, kind", [("all_gather", "all-gather"), ("all_to_all", "all-to-all")])
def test_the_step_is_taken_apart(form, kind):
    dispatch = dataclasses.replace(small.ROOMY, form=form)
    config = small.config(
        small.ONE_LAYER, data=1, fsdp=2, expert=4, dispatch=dispatch, microbatch_size=8, batch_size=16
    )
    mesh = small.mesh(1, 2, 4)
    step = compile_step(config, mesh, devices_per_node=2)
    state = small.state(config, mesh)
    here = jax.devices()[0]

    def held(tree):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == here)

    assert step.state_bytes["parameters"] == step.gradient_bytes == held(state.params)
    assert step.state_bytes["moments"] == held(state.opt_state)
    batch = 2 * 1 * (config.data.sequence_length + 1) * 4
    assert batch <= step.state_bytes["other"] <= batch + held(state.router_bias) + 64
    assert kind in {row.kind for row in step.traffic}
    assert {row.crosses_nodes for row in step.traffic if row.group == 8} == {True}
    assert step.flops > 16 / 8 * config.data.sequence_length * counts.flops_per_token(config.model, 1)


@pytest.mark.slow
def test_rounds_in_one_loop_count_as_one_round_apart_from_it(monkeypatch):
    dispatch = DispatchConfig(form="all_to_all", ranks_per_node=2, capacity_factor=1.0)
    config = small.config(small.ONE_LAYER, data=1, fsdp=2, expert=4, dispatch=dispatch, remat="full")
    mesh, in_rounds = small.mesh(1, 2, 4), travel.in_rounds
    in_one_loop = compile_step(config, mesh, devices_per_node=4)
    monkeypatch.setattr(travel, "in_rounds", lambda *arguments, recompute: in_rounds(*arguments, recompute=False))
    apart = compile_step(config, mesh, devices_per_node=4)
    assert in_one_loop.flops == apart.flops
    sent = [[row.bytes_sent for row in step.traffic if row.kind == "all-to-all"] for step in (in_one_loop, apart)]
    assert sum(sent[0]) == sum(sent[1]) > 0


@pytest.fixture(scope="module")
def planned():
    """A plan for 8 H100, and its step as this machine's own compiler makes it."""
    training = dict(microbatch_size=8, batch_size=16, loss_chunk_size=16)
    model = dataclasses.replace(small.ONE_LAYER, num_hidden_layers=2)
    config = small.config(model, data=1, fsdp=2, expert=4, dispatch=DispatchConfig(), **training)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=64))
    plan = make_plan(config, hardware.HARDWARE["H100"], 8, 1e6)
    return plan, compile_step(plan.config, small.mesh(1, 2, 4), 8)


def test_state_and_gradients_are_compiled_as_planned(planned):
    found = {one.name: one for one in told.compare(*planned)}
    assert found["sums of gradients"].ratio == 1
    assert found["state"].ratio == pytest.approx(1, abs=0.02)  # the batch is an argument too
    assert 1 <= found["products"].ratio < 2  # buffers have room for a quarter more, and blocks of rows are not full
    assert set(found) >= {"peak memory", "all-gather", "reduce-scatter", "all-reduce", "all-to-all"}


def test_a_compiled_plan_says_whether_it_fits(planned):
    plan, step = planned
    text = told.as_text(plan, step)
    assert "it fits" in text and "closed form against compiled" in text and "GiB too much" not in text
    large = dataclasses.replace(step, peak_bytes=int(plan.limit) + 3 * 2**30)
    text = told.as_text(plan, large)
    assert "3.0 GiB too much" in text and "what helps most, by closed form: " in text
    assert told.as_json(plan, large)["fits"] is False
    assert json.loads(json.dumps(told.as_json(plan, step)))["fits"] is True


def test_a_batch_that_does_not_spread_is_told():
    with pytest.raises(ConfigError, match="training.microbatch_size = 12"):
        compile_step(small.config(data=8, batch_size=12), small.mesh(8), None)


@pytest.mark.parametrize(
    "name, chips, sizes, slice_name",
    [
        ("v5p", 1024, None, "v5p:8x8x16"),
        ("v5p", 1024, (4, 16, 16), "v5p:4x16x16"),
        ("v5p", 4, None, "v5p:1x2x2"),
        ("v4", 512, None, "v4:8x8x8"),
        ("v5e", 256, None, "v5e:16x16"),
        ("v5e", 8, None, "v5e:4x2"),
        ("v6e", 32, None, "v6e:8x4"),
        ("tpu7x", 256, None, "tpu7x:4x8x8"),
    ],
)
def test_slices(name, chips, sizes, slice_name):
    assert topology.slice_name(name, chips, sizes) == slice_name


@pytest.mark.parametrize(
    "name, chips, sizes, message",
    [
        ("v5e", 512, None, "no v5e slice of 512 chips; near are 128 and 256"),
        ("v5p", 1000, None, "no v5p slice of 1000 chips; near are"),
        ("v5p", 64, (4, 4, 8), "no slice of 4x4x8 for 64 chips"),
        ("v5p", 64, (64,), "3 sides must multiply to 64"),
    ],
)
def test_slices_that_there_are_not(name, chips, sizes, message):
    with pytest.raises(ConfigError, match=message):
        topology.slice_name(name, chips, sizes)


def test_every_target_is_a_row_of_the_hardware_table():
    assert {*topology.GPUS, *topology.TPUS} <= set(hardware.HARDWARE)


def test_targets_that_cannot_be_compiled_for_are_told():
    with pytest.raises(ConfigError, match="nothing compiles for A100 ahead of time"):
        topology.devices("A100", 8)
    with pytest.raises(ConfigError, match="12 GPUs are not whole nodes"):
        topology.devices("H100", 12)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_compiler_names_the_extra():
    with pytest.raises(ConfigError, match="plan-tpu"):
        topology.devices("v5p", 4)


def test_sides_of_a_slice_are_read():
    assert topology.read_sides(None) is None and topology.read_sides("8x8x16") == (8, 8, 16)
    for text in ("8x8x", "8*8", "0x4", ""):
        with pytest.raises(ConfigError, match="must be the sides of a slice"):
            topology.read_sides(text)
    with pytest.raises(ConfigError, match="H100 is none"):
        topology.devices("H100", 8, (2, 2, 2))


def test_the_proto_names_the_gpu():
    text = topology.target_config(topology.GPUS["H200"])
    assert 'device_description_str: "NVIDIA H200"' in text and "major: 9 minor: 0" in text
    assert text.count("{") == text.count("}")
