"""The state that a run begins with: random weights, those of a published checkpoint, or those of another run."""

from pathlib import Path

from jax.sharding import Mesh

from dsjax import hub
from dsjax.config import Config, ConfigError
from dsjax.hub.architecture import is_published
from dsjax.training import checkpoint
from dsjax.training.state import TrainState, abstract_state, init_state, state_from
from dsjax.training.workdir import CHECKPOINTS


def begin(config: Config, mesh: Mesh) -> TrainState:
    """The state of step 0, on the mesh; with `init_from`, weights and routing biases of that checkpoint.

    Raises:
      ConfigError: the checkpoint is damaged, all of a run are, or it does not fit config.model.
    """
    if config.init_from is None:
        return init_state(config, mesh)
    source = Path(config.init_from).expanduser()
    if is_published(source):
        loaded = hub.load(source, mesh, "float32", config=config.model)
        return state_from(config, mesh, loaded.params, loaded.router_bias)
    step = checkpoint.newest_to_read(source / CHECKPOINTS)
    if step is None:
        raise ConfigError(f"init_from: {source} holds no checkpoint")
    state = abstract_state(config, mesh)
    wanted = {"params": state.params, "router_bias": state.router_bias}
    restored = checkpoint.restore(source / CHECKPOINTS, step, wanted, part=True, verify=False)
    return state_from(config, mesh, restored["params"], restored["router_bias"])
