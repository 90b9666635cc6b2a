"""Expert parallelism on ``torch.distributed``: experts on different processes, rows that travel to them.

    >>> parallel = expert_parallelism(size=4)            # on every process, after init_process_group
    >>> layer = MHMoELayer(config, parallel=parallel)    # holds a quarter of the experts

Gradients of the dense part are the caller's to average, as under any data parallelism; those of expert weights come out
right for such an average within one group of ``size`` processes, and are to be summed over the ``replicas``.
"""

from .rows import DistributedExperts, TrafficCounter, expert_parallelism, gather_rows
from .sharding import RankGroups, ShardedParameter, sharded_experts

__all__ = [
    "DistributedExperts",
    "RankGroups",
    "ShardedParameter",
    "TrafficCounter",
    "expert_parallelism",
    "gather_rows",
    "sharded_experts",
]
