"""dsjax: train DeepSeek-style models (MLA, routed experts, MTP) in JAX, from a laptop to a pod.

Importing this package is cheap: JAX, Flax and TFDS are imported by the modules that use them.

Shape letters, used in array names (`x_BTD`) and einsum strings alike:

    B  sequences in a (micro)batch      T  positions in a sequence      S  key positions
    D  hidden size                      V  vocabulary                   L  layers of a stack
    N  attention heads                  H  per-head size                R  rank of a latent
    E  routed experts                   K  experts chosen per token     F  feed-forward width
    M  tokens, flattened (B * T)        C  rows in a dispatch buffer    G  expert groups
"""

__version__ = "0.1.0"
