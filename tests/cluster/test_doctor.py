"""``ntpseg doctor``: ranks that differ, ranks that do not come, and two real ranks over gloo."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ntpseg.cluster.facts import RankFacts, code_digest, data_digest, rank_facts
from ntpseg.cluster.findings import find, ranges

ROOT = Path(__file__).parents[2]


def _facts(rank: int, **changes: object) -> RankFacts:
    same = RankFacts(rank, f"host{rank // 2}", {"torch": "2.13.0"}, "c0de", "da7a", "H100", 60 << 30, 9 << 40, 7e14)
    return dataclasses.replace(same, **changes)


def test_ranks_that_are_alike_have_no_findings() -> None:
    assert find([_facts(rank) for rank in range(4)], [0.0, 0.01, -0.02, 0.4]) == []


@pytest.mark.parametrize(
    ("changes", "words", "fatal"),
    [
        ({"versions": {"torch": "2.12"}}, ("torch must be the same", "2.13.0 on ranks 0-2", "2.12 on rank 3"), True),
        ({"versions": {"torch": "2.13.0", "nccl": "2.28"}}, ("nccl", "none on ranks 0-2"), True),
        ({"code": "0ther"}, ("the code of ntpseg", "0ther on rank 3"), True),
        ({"data": "0ther"}, ("the data set", "copy it again"), True),
        ({"device": "A100"}, ("the device", "A100 on rank 3"), False),
        ({"flops": 3e14}, ("rank 3 (host1) multiplies at 43%", "throttled"), False),
        ({"free_disk": 1 << 30}, ("rank 3 (host1) has 1.0 GiB free", "checkpoints"), False),
    ],
)  # fmt: skip
def test_what_differs_is_named_with_ranks_and_cure(changes: dict, words: tuple[str, ...], fatal: bool) -> None:
    (finding,) = find([*map(_facts, range(3)), _facts(3, **changes)], [0.0] * 4)
    assert all(word in finding.text for word in words), finding.text
    assert finding.fatal is fatal


def test_a_clock_that_is_off_is_a_note_behind_what_is_fatal() -> None:
    first, second = find([_facts(0), _facts(1, code="0ther")], [0.0, -7.5])
    assert first.fatal and not second.fatal and "-7.5 s on rank 1" in second.text


def test_ranges_are_short() -> None:
    assert ranges([5, 0, 2, 1, 9, 8]) == "0-2, 5, 8-9"


def test_the_digest_of_data_sees_another_copy(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "1.png").write_bytes(bytes(200_000))
    assert data_digest(tmp_path / "a") == data_digest(tmp_path / "b")
    (tmp_path / "b" / "images" / "1.png").write_bytes(bytes(199_999) + b"x")  # the end counts
    other = data_digest(tmp_path / "b")
    assert data_digest(tmp_path / "a") != other
    (tmp_path / "b" / "images" / "1.png").rename(tmp_path / "b" / "images" / "2.png")  # and the name
    assert data_digest(tmp_path / "b") != other
    assert code_digest() == code_digest() != ""


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ValueError, match=f"data must be a folder on every rank, got {tmp_path / 'none'}"):
        rank_facts(0, torch.device("cpu"), tmp_path / "none", tmp_path)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _start(rank: int, world: int, port: int, *arguments: str, code: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    program = (
        f"{code}\nimport sys\nfrom ntpseg.cli import main\nsys.argv = ['ntpseg', 'doctor', *sys.argv[1:]]\nmain()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload]


@pytest.mark.parametrize("differ", [False, True])
def test_two_ranks_meet(differ: bool, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"pixels")
    port = _free_port()
    other = "import ntpseg.cluster.facts as facts\nfacts.code_digest = lambda: '0ther'" if differ else ""
    arguments = ("--data", str(tmp_path), "--json", "--timeout", "60")
    ranks = [_start(0, 2, port, *arguments), _start(1, 2, port, *arguments, code=other)]
    out = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [int(differ), 0], out
    result = json.loads(out[0][0][out[0][0].index("{") :])
    assert result["healthy"] is not differ
    assert [each["rank"] for each in result["ranks"]] == [0, 1] and result["ranks"][0]["data"] == result["ranks"][1][
        "data"
    ]
    assert all(abs(skew) < 5 for skew in result["clock_skew_seconds"])
    assert result["all_reduce_bytes_per_second"]["gloo"][str(1 << 20)] > 0
    assert differ == any("0ther on rank 1" in finding["text"] for finding in result["findings"])


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_named_in_one_line(rank: int) -> None:
    process = _start(rank, 2, _free_port(), "--timeout", "1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and not out
    message = "rank 1 of 2 must come" if rank == 0 else "rank 1 on"
    assert message in err and len(err.strip().splitlines()) == 1, err


def test_alone_it_needs_no_launcher() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ntpseg.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "1 rank: a run can start" in done.stdout
