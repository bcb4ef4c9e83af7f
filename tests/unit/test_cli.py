"""What the command line says when it is stopped."""

from collections.abc import Sequence

import pytest

from arra import cli


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        (["train", "base"], True),
        (["evaluate", "sweep", "MODEL"], True),
        (["tokenizer", "train", "DATA"], True),
        (["evaluate", "--model", "MODEL"], False),
        (["bench", "generate"], False),
    ],
)
def test_a_stopped_command_says_whether_it_goes_on(
    command: list[str],
    goes_on: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(arguments: Sequence[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, command[0], stopped)
    assert cli.main(command) == 130
    said = capsys.readouterr().err
    assert "stopped" in said
    assert ("goes on where it was" in said) == goes_on
