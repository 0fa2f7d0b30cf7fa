"""The names that the model code imports from `model/rotary_frequencies.py`.

An exported folder contains that file itself, instead of this one.
"""

from sas_megatron.model.rotary_frequencies import rotary_frequencies as rotary_frequencies
from sas_megatron.model.rotary_frequencies import scale_frequencies as scale_frequencies
