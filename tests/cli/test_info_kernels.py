from __future__ import annotations

import json

from click.testing import CliRunner

from loratools.cli import main as cli


def test_kernels_are_listed_without_an_input() -> None:
    done = CliRunner().invoke(cli.main, ["info", "--kernels", "--json"])
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert said["schema"] == "loratools.kernels/1"
    assert "loratools.linalg.factored.truncate_many" in {row["name"] for row in said["modules"]}
    assert "truncate_many" in CliRunner().invoke(cli.main, ["info", "--kernels"]).stdout
    assert CliRunner().invoke(cli.main, ["info", "--kernels", "-q"]).stdout == ""


def test_an_input_and_the_list_exclude_each_other() -> None:
    assert CliRunner().invoke(cli.main, ["info", "--kernels", "x"]).exit_code == 2
    assert CliRunner().invoke(cli.main, ["info"]).exit_code == 2
