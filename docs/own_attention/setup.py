"""An attention variant in its own package: three entry points name its config, its costs and its layer.

The names are `KIND.config`, `KIND.costs` and `KIND.layer`. sas_megatron imports the
layer, and with it torch, only when it builds a model.
"""

from setuptools import setup

setup(
    name="tied-attention",
    version="1.0",
    py_modules=["tied_attention", "tied_attention_layer"],
    entry_points={
        "sas_megatron.attention": [
            "tied.config = tied_attention:TiedAttentionConfig",
            "tied.costs = tied_attention:TiedAttentionCosts",
            "tied.layer = tied_attention_layer:TiedSelfAttention",
        ]
    },
)
