"""What one rank says of itself: versions, code, data, device, free space and how fast it multiplies."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ntpseg.data.shards import dataset_url, open_packed

_PACKAGES = ("transformers", "accelerate", "deepspeed", "triton", "numpy", "safetensors", "tokenizers")
_ENDS = 1 << 16  # bytes from the start and the end of each file of a data set that enter its digest


@dataclass(frozen=True)
class RankFacts:
    """One rank.

    Attributes:
        rank: its number.
        host: name of its machine.
        versions: of Python, PyTorch, its CUDA and NCCL, and what ntpseg works with; only what is installed.
        code: digest of the installed package, native operators included.
        data: digest of the data set, see `data_digest`; empty where none was named.
        device: name of the card, or of the processor's architecture.
        free_memory, free_disk: bytes, of the device and of the folder that runs are written to.
        flops: FLOP/s of a matrix product, float32 on a CPU and bfloat16 on a GPU.
    """

    rank: int
    host: str
    versions: dict[str, str]
    code: str
    data: str
    device: str
    free_memory: int
    free_disk: int
    flops: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def rank_facts(rank: int, device: torch.device, data: Path | None, output: Path) -> RankFacts:
    """Gathers the facts of this process.

    Args:
        rank: of this process.
        device: that it will train on.
        data: folder of the data set, or URL of a packed one; None: there is none.
        output: folder that runs are written to; its nearest parent that exists is looked at.

    Raises:
        ValueError: `data` is no folder here, or no packed data set can be read at the URL.
    """
    found = "" if data is None else data_digest(data)
    while not output.exists():
        output = output.parent
    return RankFacts(
        rank=rank,
        host=socket.gethostname(),
        versions=versions(),
        code=code_digest(),
        data=found,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        free_memory=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory(),
        free_disk=shutil.disk_usage(output).free,
        flops=matmul_flops(device),
    )


def versions() -> dict[str, str]:
    """Of everything that must be the same on all ranks."""
    import ntpseg

    found = {"python": platform.python_version(), "torch": torch.__version__, "ntpseg": ntpseg.__version__}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """Of every Python file and native operator of the package."""
    import ntpseg

    root = Path(ntpseg.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".so", ".json", ".yaml")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    # the kernels' folder may be a link, which `rglob` does not follow
    for path in sorted((root / "kernels").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def data_digest(folder: Path) -> str:
    """Of names, sizes, and the first and last 64 KiB of every file: it sees another copy, not every changed pixel.

    Training itself compares whole contents; here a set of a million files must be looked at in minutes, by all ranks.
    Of a packed data set at a URL it is that of its manifest, which holds the hash of every shard; shards are asked for
    their sizes.

    Raises:
        ValueError: this host finds no folder there, or no packed data set that it can read; names the host.
    """
    host = socket.gethostname()
    if (url := dataset_url(folder)) is not None:
        try:
            packed = open_packed(url)
            for split in packed.splits.values():
                split.check_shards()
        except ValueError as error:
            raise ValueError(f"data must be a packed data set on every rank, got on {host}: {error}") from error
        return hashlib.sha256(packed.manifest.to_json().encode()).hexdigest()[:16]
    if not folder.is_dir():
        raise ValueError(f"data must be a folder on every rank, got {folder}, which is none on {host}")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            if size > _ENDS:
                file.seek(max(_ENDS, size - _ENDS))
                digest.update(file.read())
    return digest.hexdigest()[:16]


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a square product on random data: a card that is throttled or shared shows beside the others."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), 0)
