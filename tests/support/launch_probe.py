"""What fairseq's ``call_main`` makes of a launcher's environment; imports the plugin only if told to."""

import os
from typing import Any


def places_found(environment: dict[str, str], repaired: bool) -> list[Any]:
    """The outcome with no flag, with ``--distributed-world-size``, and with ``--distributed-port`` too.

    Each is ``[init method, world size, rank, no_spawn, device id]`` or the error.
    """
    os.environ.update(environment)
    if repaired:
        import mhmoe_fairseq

        mhmoe_fairseq.register()
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.distributed import utils
    from omegaconf import OmegaConf

    everything = OmegaConf.to_container(OmegaConf.structured(FairseqConfig), resolve=True, enum_to_str=True)
    outcomes: list[Any] = []
    for given in ({}, {"distributed_world_size": 2}, {"distributed_world_size": 4, "distributed_port": 29500}):
        settings = {**everything["distributed_training"], "device_id": int(os.environ.get("LOCAL_RANK", 0)), **given}
        config = OmegaConf.create(settings)
        try:
            utils.infer_init_method(config)
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        else:
            names = ("init_method", "world_size", "rank", "no_spawn")
            outcomes.append([config[f"distributed_{name}"] for name in names] + [config.device_id])
    return outcomes
