"""The code of exported models, which needs torch, transformers and sentencepiece only.

`checkpoint export` copies these files, and `attention/sas/simulated_attention.py` instead of its namesake
here. They run without sas_megatron (`trust_remote_code=True`).
"""
