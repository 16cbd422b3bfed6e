"""Does the clock show what the FLOPs promise? Dense against sparse, alternately, on real images.

Predicted is the ratio of multiply-adds: of the blocks alone, of the backbone, or of everything in a network. The time
of the sparse side includes gates, heads, packing and unpacking, so that every overhead counts against us.
"""

from sievit.bench.heads import HeadsBench, bench_heads
from sievit.bench.models import bench_models
from sievit.bench.network import BackboneBench, BlocksBench, NetworkBench, bench_backbone, bench_blocks, bench_network
