"""`python -m sas_megatron` is the `sas-megatron` command."""

from sas_megatron.cli.main import main

if __name__ == "__main__":
    main()
