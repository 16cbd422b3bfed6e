"""`sievit bench ...`."""

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

    print_json(bench_network(parse(NetworkBench, args, "bench network")))
    return 0


def heads(args: list[str]) -> int:
    from sievit.bench import HeadsBench, bench_heads

    print_json(bench_heads(parse(HeadsBench, args, "bench heads")))
    return 0
