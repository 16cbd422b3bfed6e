"""`sievit bench ...`."""

from dataclasses import replace
from pathlib import Path

from sievit.cli.command import parse, print_json


def blocks(args: list[str]) -> int:
    from sievit.bench import BlocksBench, bench_blocks

    print_json(bench_blocks(parse(BlocksBench, args, "bench blocks")))
    return 0


def backbone(args: list[str]) -> int:
    from sievit.bench import BackboneBench, bench_backbone

    print_json(bench_backbone(parse(BackboneBench, args, "bench backbone")))
    return 0


def network(args: list[str]) -> int:
    from sievit.bench import NetworkBench, bench_network

    config = parse(NetworkBench, args, "bench network")
    print_json(bench_network(replace(config, checkpoints=_found(config.checkpoints))))
    return 0


def heads(args: list[str]) -> int:
    from sievit.bench import HeadsBench, bench_heads

    config = parse(HeadsBench, args, "bench heads")
    print_json(bench_heads(replace(config, checkpoints=_found(config.checkpoints))))
    return 0


def _found(checkpoints: tuple[Path, ...]) -> tuple[Path, ...]:
    """Paths of models that come with sievit instead of their names; those of the hub keep theirs."""
    from sievit.hub.fetch import HUB
    from sievit.report.common import find_model

    return tuple(path if str(path).startswith(HUB) else find_model(path) for path in checkpoints)
