"""The names that the model code imports from `attention/sas/simulated_attention.py`.

An exported folder contains that file itself, instead of this one.
"""

from sas_megatron.attention.sas.simulated_attention import Simulation as Simulation
from sas_megatron.attention.sas.simulated_attention import SimulationShape as SimulationShape
from sas_megatron.attention.sas.simulated_attention import aggregate_blocks as aggregate_blocks
