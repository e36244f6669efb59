"""Owns the logical axis names that tag every parameter and activation.

A placement table elsewhere maps these names to mesh axes; nothing else declares them.
"""

# Axes of parameters.
LAYERS = 'layers'
EMBED = 'embed'
MLP = 'mlp'
HEADS = 'heads'
KV_HEADS = 'kv_heads'
HEAD = 'head'
VOCAB = 'vocab'
EXPERTS = 'experts'
EXPERT_EMBED = 'expert_embed'
EXPERT_MLP = 'expert_mlp'
POSITIONS = 'positions'

# Axes of activations.
BATCH = 'batch'
LENGTH = 'length'
EMBED_ACT = 'embed_act'
HEADS_ACT = 'heads_act'
KV_HEADS_ACT = 'kv_heads_act'
MLP_ACT = 'mlp_act'
VOCAB_ACT = 'vocab_act'
