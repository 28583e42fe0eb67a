"""The examples of a follower as a service are well-formed, and give commands that there are."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLLOWER = Path(__file__).parents[2] / "examples/follower"
UNIT = FOLLOWER / "revector-follow@.service"


def service() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLLOWER / "compose.yaml").read_text(encoding="utf-8"))["services"]["follower"])


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read_string(UNIT.read_text(encoding="utf-8"))
    return parser


def parse(words: list[str]) -> None:
    """As the program does, up to the point where it would begin."""
    import typer

    from revector import cli

    assert Path(words[0]).name == "revector"
    group: Any = typer.main.get_command(cli.app)
    group.commands[words[1]].make_context(words[1], words[2:])


def test_the_unit_is_well_formed_and_its_command_exists() -> None:
    assert unit().sections() == ["Unit", "Service", "Install"]
    parse(shlex.split(unit()["Service"]["ExecStart"].replace("%i", "knowledge_base")))


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Every setting is one that systemd knows; the program itself stands elsewhere here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    copy = tmp_path / UNIT.name.replace("@", "@knowledge_base")
    copy.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/revector/bin/revector", "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert [line for line in verified.stderr.splitlines() if UNIT.stem in line or copy.name in line] == []


def test_the_compose_file_is_well_formed_and_its_commands_exist() -> None:
    follower = service()
    parse(follower["command"])
    kind, *words = follower["healthcheck"]["test"]
    assert kind == "CMD"
    parse(words)
    assert (FOLLOWER / follower["build"] / "Dockerfile").is_file()
    assert follower["deploy"]["replicas"] == 2


def test_both_leave_time_for_the_batch_in_hand() -> None:
    """The same grace and the same restarts, whoever supervises it."""
    follower, settings = service(), unit()["Service"]
    assert follower["stop_grace_period"] == f"{settings['TimeoutStopSec']}s"
    assert follower["restart"] == settings["Restart"] == "on-failure"
