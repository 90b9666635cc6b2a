"""Each repair of stock fairseq works, and is still needed: the same probe fails without the package.

A failing ``test_stock_...`` is good news: a new release of fairseq, NumPy or torch made the repair needless.
"""

import json
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq import utils as fairseq_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from launch_probe import places_found
from workers import Workers

import mhmoe_fairseq
from mhmoe_fairseq import compat

# Prints what breaks, with ("repaired") or without the package imported first.
PROBE = """
import collections, io, json, logging, sys, warnings
logging.getLogger().setLevel(logging.ERROR)
warnings.resetwarnings()
seen = []
warnings.showwarning = lambda message, category, *rest: seen.append(f"{category.__name__}: {message}")
if sys.argv[1] == "repaired":
    import mhmoe_fairseq
    mhmoe_fairseq.register()
import torch
import torchscale.architecture.decoder
from fairseq.data import TokenBlockDataset
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed.utils import _split_tensors_from_obj
from omegaconf import OmegaConf

def lines_as_blocks():
    lines = [torch.tensor([5, 6, 2]), torch.tensor([7, 2])]
    blocks = TokenBlockDataset(lines, [3, 2], block_size=None, pad=1, eos=2, break_mode="eos")
    return [block.tolist() for block in blocks]

def what_rank_0_sends():
    saved = OmegaConf.to_container(OmegaConf.structured(FairseqConfig), resolve=True, enum_to_str=True)
    checkpoint = {"cfg": OmegaConf.create(saved), "extra": collections.defaultdict(list, losses=[1.5])}
    buffer = io.BytesIO()
    torch.save(_split_tensors_from_obj({**checkpoint, "model": {"w": torch.ones(2)}}, []), buffer)
    got = torch.load(io.BytesIO(buffer.getvalue()), map_location="cpu")
    return [got["cfg"].common.seed, got["extra"]["losses"]]

def outcome(action):
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

if sys.argv[1] == "repaired":
    import mhmoe_fairseq.evaluation.perplexity  # with fairseq-eval-lm's module, which configures logging, too
root = logging.getLogger()
found = {"blocks": outcome(lines_as_blocks), "sent": outcome(what_rank_0_sends), "warnings": seen}
print(json.dumps({**found, "logging": [root.level, len(root.handlers)]}))
"""

# Two ranks: rank 0 sends a checkpoint as fairseq's trainer does on resume, rank 1 prints what it got.
RESUME = """
import json, sys
import torch, torch.distributed as dist
import mhmoe_fairseq
mhmoe_fairseq.register()
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
saved = OmegaConf.to_container(OmegaConf.structured(FairseqConfig), resolve=True, enum_to_str=True)
checkpoint = {"cfg": OmegaConf.create(saved), "model": {"w": torch.arange(3.0)}, "step": 3}
sent = checkpoint if rank == 0 else None
got = distributed_utils.broadcast_object(sent, src_rank=0, group=distributed_utils.get_global_group())
if rank == 1:
    print(json.dumps([got["cfg"].common.seed, got["model"]["w"].tolist(), got["step"]]))
dist.destroy_process_group()
"""


def probe(repository: Path, mode: str) -> dict:
    command = [sys.executable, "-c", PROBE, mode]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def stock(repository: Path) -> dict:
    return probe(repository, "stock")


@pytest.fixture(scope="module")
def repaired(repository: Path) -> dict:
    return probe(repository, "repaired")


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 1 still has np.compat")
def test_stock_sentences_as_blocks_need_np_compat(stock: dict) -> None:
    assert stock["blocks"].startswith("AttributeError") and "compat" in stock["blocks"]


def test_sentences_become_blocks(repaired: dict) -> None:
    assert repaired["blocks"] == [[5, 6, 2], [7, 2]]


def test_stock_imports_warn_and_ours_do_not(stock: dict, repaired: dict) -> None:
    assert any("custom_fwd" in warning for warning in stock["warnings"])
    assert not [warning for warning in repaired["warnings"] if warning.startswith("FutureWarning")]


def test_stock_imports_configure_logging_and_ours_leave_it_as_it_was(stock: dict, repaired: dict) -> None:
    level, handlers = stock["logging"]
    assert level in (logging.INFO, logging.DEBUG) and handlers == 1  # fairseq 0.12.2, fairseq-fixed
    assert repaired["logging"] == [logging.ERROR, 0]


def test_stock_refuses_the_checkpoint_that_a_resume_broadcasts(stock: dict) -> None:
    assert "Weights only load failed" in stock["sent"]


def test_the_checkpoint_that_a_resume_broadcasts_is_read(repaired: dict) -> None:
    assert repaired["sent"] == [1, [1.5]]


def test_a_checkpoint_broadcast_to_another_process_arrives_whole(repository: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", RESUME]
    ranks = [
        subprocess.Popen([*command, rank, port], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in ("0", "1")
    ]
    try:
        output = [rank.communicate(timeout=600)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], output
    assert json.loads(output[1].splitlines()[-1]) == [1, [0.0, 1.0, 2.0], 3]


class Unknown:
    """Stands for a class in somebody else's checkpoint."""


def test_an_unknown_class_is_still_refused(tmp_path: Path) -> None:
    torch.save({"x": Unknown()}, tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)


def test_stock_advises_to_unpickle_what_it_refused_and_ours_does_not(tmp_path: Path) -> None:
    torch.save({"model": {}, "cfg": Unknown()}, tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError, match="`weights_only` set to `False` will likely succeed"):
        checkpoint_utils.load_checkpoint_to_cpu.__wrapped__(str(tmp_path / "checkpoint.pt"))
    with pytest.raises(ValueError, match="checkpoint.pt: refused, not run: it holds an object of test_compat.Unknown"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))


def test_applying_twice_changes_nothing() -> None:
    compat.apply()
    before = (np.compat, set(torch.serialization.get_safe_globals()), list(mhmoe_fairseq.__path__), warnings.filters[:])
    compat.apply()
    after = (np.compat, set(torch.serialization.get_safe_globals()), list(mhmoe_fairseq.__path__), warnings.filters[:])
    assert after == before
    assert after[1] >= set(compat.checkpoint_globals())


def test_gradients_on_the_cpu_are_clipped_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in
               ((3, torch.float32), (70, torch.float32), (9, torch.bfloat16))]  # fmt: skip
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    by_fairseq = torch.norm(torch.stack([torch.norm(weight.grad, p=2, dtype=torch.float32) for weight in weights]))
    before = [weight.grad.clone() for weight in weights]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))  # any but the gradients'
    assert fairseq_utils.clip_grad_norm_(weights, 1.0).equal(by_fairseq)  # to the last digit
    for weight, gradient in zip(weights, before):
        torch.testing.assert_close(weight.grad, gradient * (1 / by_fairseq).to(gradient.dtype))
    monkeypatch.setattr(fairseq_utils, "multi_tensor_l2norm_available", False)
    assert fairseq_utils.clip_grad_norm_(weights, 1.0).device.type == "meta"  # stock: of no use to these


def training_arguments(*flags: str) -> Namespace:
    """What stock fairseq makes of its own flags, for a model and a task of its own."""
    command_line = ["data", "--arch", "transformer_lm", "--task", "language_modeling", *flags]
    return options.parse_args_and_arch(options.get_training_parser(), command_line)


def test_stock_bf16_means_a_tpu() -> None:
    assert not training_arguments().tpu
    assert training_arguments("--bf16").tpu


def test_refuse_tpu_lets_other_devices_through() -> None:
    compat.refuse_tpu(False)
    with pytest.raises(ValueError, match="--bf16"):
        compat.refuse_tpu(True)
    config = convert_namespace_to_omegaconf(training_arguments("--bf16")).distributed_training
    with pytest.raises(ValueError, match="--bf16"):  # before torch_xla is looked for
        distributed_utils.infer_init_method(config)


TORCHRUN = {"MASTER_ADDR": "node0", "MASTER_PORT": "29400", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
SLURM = {
    "SLURM_STEP_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
READS_ENVIRONMENT_ITSELF = "fairseq 0.12.2 reads the environment whatever the world size and the number of GPUs"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs fairseq finds the processes itself")
on_fairseq_fixed = pytest.mark.skipif(sys.version_info < (3, 11), reason=READS_ENVIRONMENT_ITSELF)


def launched(environment: dict[str, str], *, repaired: bool) -> list:
    """What a process of the launcher finds: for no flag, for a world size, and for a world size and a port."""
    return Workers(1).run(places_found, environment, repaired, group=False)[0]


@without_gpu
@on_fairseq_fixed
def test_stock_torchrun_without_gpu_is_independent_trainings_or_a_division_by_zero() -> None:
    alone, told, _ = launched(TORCHRUN, repaired=False)
    assert alone[:2] == [None, 1]  # no process group: each of the four would train alone
    assert told.startswith("ZeroDivisionError")


@without_gpu
def test_torchruns_processes_are_connected() -> None:
    assert launched(TORCHRUN, repaired=True) == [["env://", 4, 3, True, 1]] * 3


def test_a_process_that_was_told_its_place_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    given = {"distributed_init_method": "tcp://node0:1", "distributed_world_size": 2, "tpu": False}
    config = Namespace(**given, pipeline_model_parallel=False)
    compat.read_torchrun(config)
    assert vars(config) == {**given, "pipeline_model_parallel": False}


@pytest.fixture()
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a task, and a ``scontrol`` that knows the node names."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[0-1]" ] && printf "node0\\nnode1\\n"\n')
    scontrol.chmod(0o755)
    return {**SLURM, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


@without_gpu
@on_fairseq_fixed
def test_stock_slurm_without_gpu_asks_for_a_cuda_device(slurm: dict[str, str]) -> None:
    outcome = launched(slurm, repaired=False)[2]
    assert "NVIDIA" in outcome or "CUDA" in outcome


@without_gpu
def test_slurms_tasks_are_connected(slurm: dict[str, str]) -> None:
    assert launched(slurm, repaired=True)[2] == ["tcp://node0:29500", 4, 3, True, 1]


@without_gpu
def test_one_slurm_task_on_a_node_without_gpu_is_refused(slurm: dict[str, str]) -> None:
    outcome = launched({**slurm, "SLURM_NTASKS_PER_NODE": "1"}, repaired=True)[2]
    assert "--distributed-world-size (4)" in outcome and "--ntasks-per-node" in outcome


def test_every_patch_at_run_time_is_listed(repository: Path) -> None:
    patched = re.compile(r"^\s+(sys\.(excepthook|argv)|PathManager\.\w+|torch\.\w+|\w+\.__class__) = (?!before)", re.M)
    package = repository / "mhmoe_fairseq"
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if patched.search(path.read_text())}
    assert found <= set(re.findall(r"``(\w[\w/]+\.py)``", compat.__doc__)) | {"compat.py"}
