"""`sas-megatron checkpoint`: whether what a run has saved is what it wrote."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def checkpoint() -> None:
    """Check saved checkpoints. (To go on at another layout needs no command: change parallel.*.)"""


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
def verify(path: Path) -> None:
    """Read every file of the checkpoint PATH, or of all in a run's folder, and compare checksums.

    Exit status 2 if anything is damaged.
    """
    from sas_megatron.checkpoint.manifest import GO_BACK, find_checkpoints, verify_checkpoint
    from sas_megatron.config.errors import FileProblem

    within = find_checkpoints(path / "checkpoints") or find_checkpoints(path)
    damaged = []
    for each in sorted(within) or [path]:
        try:
            manifest = verify_checkpoint(each)
        except FileProblem as problem:
            if not within:
                raise
            click.echo(str(problem))
            damaged.append(each.name)
            continue
        size = sum(record.size_bytes for record in manifest.files.values())
        click.echo(f"{each}: {len(manifest.files)} files, {size:,} bytes, as written at step {manifest.step}")
    if damaged:
        raise FileProblem(path, f"holds damaged checkpoints: {', '.join(damaged)}", GO_BACK)
