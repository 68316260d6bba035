"""`edgeloop doctor`: the facts are those of this installation, and what is broken is found."""

import json

import pytest

from edgeloop import __version__, doctor
from edgeloop.cli import main
from edgeloop.llama import Llama


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main(["doctor", *arguments])
    return done.value.code, capsys.readouterr()


def test_a_sound_installation(demo_model, capsys):
    code, printed = run(capsys, "--json", "--offline", "-t", "1")
    found = json.loads(printed.out)
    assert code == 0 and found["problems"] == [] and not printed.err
    assert found["edgeloop"] == __version__ and "CPU" in found["backends"]
    assert found["devices"] and found["devices"][0]["memory_bytes"] > 1 << 30
    assert any(name.startswith(("libllama.", "llama.")) for name in found["libraries"])
    assert found["demo"]["plain"]["tokens_per_second"] > 0


def test_the_table(capsys):
    code, printed = run(capsys, "--no-demo")
    assert code == 0 and "all is well" in printed.out and "loop interface" in printed.out


def test_another_header(monkeypatch, capsys):
    facts = doctor.facts()
    monkeypatch.setattr(doctor, "facts", lambda: facts | {"loop_header": facts["loop_library"] + 1, "backends": []})
    code, printed = run(capsys, "--no-demo")
    assert code == 1 and "2 problems" in printed.out
    assert "llama-loop.h has version" in printed.err and "no backend was loaded" in printed.err


def test_a_loop_that_does_nothing(demo_model, monkeypatch):
    monkeypatch.setattr(Llama, "loop", property(lambda self: self._loop, lambda self, spec: None))
    assert doctor.demo(demo_model, threads=1)["problems"] == ["the loop changes nothing"]
