"""``ntpseg serve``: what is refused before a model is loaded, what is printed, which examples are offered."""

from __future__ import annotations

import csv
import socket
import sys
from pathlib import Path

import pytest

from ntpseg import cli
from ntpseg.serving.examples import example_sentences
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.server import address


def test_a_taken_port_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason='needs the extra "serve"')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["ntpseg", "serve", "--model", str(Path(__file__).parent), "--port", port])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2 and len(message.splitlines()) == 1
    assert f"got 127.0.0.1 port {port}" in message and "--port" in message


@pytest.mark.parametrize(
    ("host", "loopback", "shown"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:8000/"),
        ("localhost", True, "http://localhost:8000/"),
        ("::1", True, "http://[::1]:8000/"),
        ("0.0.0.0", False, "http://127.0.0.1:8000/"),
        ("10.0.0.7", False, "http://10.0.0.7:8000/"),
    ],
)
def test_which_addresses_others_can_reach(host: str, loopback: bool, shown: str) -> None:
    assert ServerOptions(host=host).loopback is loopback
    assert address(host, 8000) == shown


@pytest.mark.parametrize("wrong", [{"port": 70000}, {"max_files": 0}, {"host": ""}, {"max_waiting": -1}])
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerOptions(**wrong)  # type: ignore[arg-type]


def test_examples_are_the_frequent_sentences_of_the_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "eval" / "test"
    folder.mkdir(parents=True)
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["case", "text"], ["a", "The liver."], ["b", "the liver"], ["c", "The liver."], ["d", "x" * 99]]
        )
    assert example_sentences(tmp_path) == ["The liver."]
    assert example_sentences(tmp_path / "packed.zip") == []
