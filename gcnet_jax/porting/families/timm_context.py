"""timm's `GlobalContext` block.

No family of its own: ByobNets call it `attn`, EfficientNets `se`.
"""

from gcnet_jax.porting.families.rules import Rules, under


def rules(ours: str, theirs: str) -> Rules:
    """The table of one block."""
    return under(
        ours,
        theirs,
        (
            ('pool/logits', 'conv_attn', 'pointwise'),
            ('add/reduce', 'mlp_add.fc1', 'pointwise'),
            ('add/norm', 'mlp_add.norm', 'layer_norm'),
            ('add/expand', 'mlp_add.fc2', 'pointwise'),
            ('scale/reduce', 'mlp_scale.fc1', 'pointwise'),
            ('scale/norm', 'mlp_scale.norm', 'layer_norm'),
            ('scale/expand', 'mlp_scale.fc2', 'pointwise'),
        ),
    )
