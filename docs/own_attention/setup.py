"""An attention variant in a package of its own: the entry point is all that sas_megatron needs to find it."""

from setuptools import setup

setup(
    name="tied-attention",
    version="1.0",
    py_modules=["tied_attention", "tied_attention_layer"],
    entry_points={"sas_megatron.attention": ["tied = tied_attention:TiedAttentionConfig"]},
)
