"""`edgeloop tag` and `edgeloop export`: what is written is checked with the gguf package's own reader."""

import filecmp
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pexpect
import pytest
import tiny

from edgeloop import Loop, LoopError, ModelError, gguf_tools
from edgeloop.errors import WriteError
from edgeloop.gguf_file import GGUFFile

KEY = "edgeloop.loop"


def edgeloop(*arguments, **options):
    command = [sys.executable, "-m", "edgeloop.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", **options)


def read(path) -> tuple[dict, dict]:
    """Metadata and tensors: name -> type, shape and bytes."""
    reader = gguf.GGUFReader(path)
    fields = {
        name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")
    }  # version and counts
    metadata = {name: (field.types, field.contents()) for name, field in fields.items()}
    tensors = {t.name: (t.tensor_type, tuple(t.shape), np.asarray(t.data).tobytes()) for t in reader.tensors}
    return metadata, tensors


# ---- tag -----------------------------------------------------------------------------------------------------------


def test_tag_changes_one_key(tiny_llama, tmp_path):
    metadata, tensors = read(tiny_llama)
    assert gguf_tools.tag(tiny_llama, tmp_path / "out.gguf", "40%-70%x2:anchored") == Loop.parse("2-4x2:anchored")
    tagged, copied = read(tmp_path / "out.gguf")
    assert tagged.pop(KEY)[1] == "2-4x2:anchored" and tagged == metadata and KEY not in metadata
    assert list(copied) == list(tensors) and copied == tensors
    gguf_tools.tag(tmp_path / "out.gguf", tmp_path / "again.gguf", "1-2x2")
    assert read(tmp_path / "again.gguf")[0][KEY][1] == "1-2x2"


def test_off_gives_the_file_back(demo_model, tmp_path):
    gguf_tools.tag(demo_model, tmp_path / "tagged.gguf", "12-14x3")
    gguf_tools.tag(tmp_path / "tagged.gguf", tmp_path / "off.gguf", "off")
    assert filecmp.cmp(tmp_path / "off.gguf", demo_model, shallow=False)
    assert not filecmp.cmp(tmp_path / "tagged.gguf", demo_model, shallow=False)


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("12-30x2", LoopError, "it has 30 layers"),
        ("auto", LoopError, "name the loop itself"),
        ("nonsense", LoopError, "is not a span"),
    ],
)
def test_a_wrong_loop_writes_nothing(demo_model, tmp_path, spec, error, message):
    with pytest.raises(error, match=message):
        gguf_tools.tag(demo_model, tmp_path / "out.gguf", spec)
    assert not list(tmp_path.iterdir())


def test_another_alignment(tmp_path, load, monkeypatch):
    """A file says how its tensors are aligned; the copy is aligned as usual and says so."""

    class Aligned(gguf.GGUFWriter):
        def write_header_to_file(self, *args):
            self.add_custom_alignment(256)
            super().write_header_to_file(*args)

    monkeypatch.setattr(tiny.gguf, "GGUFWriter", Aligned)
    tiny.write_llama(tmp_path / "aligned.gguf")
    gguf_tools.tag(tmp_path / "aligned.gguf", tmp_path / "out.gguf", "1-2x2")
    metadata, tensors = read(tmp_path / "aligned.gguf")
    assert metadata["general.alignment"][1] == 256
    tagged, copied = read(tmp_path / "out.gguf")
    assert copied == tensors and "general.alignment" not in tagged
    assert load(tmp_path / "out.gguf", loop="auto", n_ctx=64).loop == Loop.parse("1-2x2")


# ---- split models --------------------------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path, monkeypatch) -> list[Path]:
    monkeypatch.setattr(tiny.gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=25))
    tiny.write_llama(tmp_path / "split.gguf")
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert [part.name for part in parts] == [f"split-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return parts


def test_a_split_model_becomes_one_file(split, tiny_llama, tmp_path):
    out = tmp_path / "out.gguf"
    gguf_tools.tag(split[0], out, "off")
    metadata, tensors = read(out)
    assert tensors == read(tiny_llama)[1]
    assert metadata == {name: value for name, value in read(split[0])[0].items() if not name.startswith("split.")}
    spec = "2-3x2:naive,kv=own"
    gguf_tools.export(split[0], tmp_path / "a.gguf", spec)
    gguf_tools.export(tiny_llama, tmp_path / "b.gguf", spec)
    assert read(tmp_path / "a.gguf")[1] == read(tmp_path / "b.gguf")[1]


def test_parts_of_a_split_model(split, tmp_path):
    with pytest.raises(ModelError, match="is not the first part"):
        gguf_tools.inspect(split[1])
    renamed = split[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match="is one of 3 parts, which are found by names like"):
        gguf_tools.inspect(renamed)
    renamed.rename(split[0])
    split[1].write_bytes(split[1].read_bytes()[:-1000])
    with pytest.raises(ModelError, match="00002-of-00003.gguf: truncated"):
        gguf_tools.inspect(split[0])
    split[1].unlink()
    with pytest.raises(ModelError, match="00002-of-00003.gguf: no such file"):
        gguf_tools.inspect(split[0])


@pytest.mark.parametrize("count", ["3", "many", -1, 2**31 - 1])
def test_a_hostile_number_of_parts(tmp_path, count):
    writer = gguf.GGUFWriter(tmp_path / "x-00001-of-00003.gguf", "llama")
    writer.add_key_value("split.count", count, gguf.GGUFValueType.get_type(count))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="is one of"):
        gguf_tools.inspect(tmp_path / "x-00001-of-00003.gguf")


# ---- the file that is written --------------------------------------------------------------------------------------


def test_the_export_of_a_tagged_model_has_no_loop(tiny_llama, tmp_path):
    gguf_tools.tag(tiny_llama, tmp_path / "tagged.gguf", "2-3x2:naive,kv=own")
    gguf_tools.export(tmp_path / "tagged.gguf", tmp_path / "out.gguf", "2-3x2:naive,kv=own")
    assert gguf_tools.inspect(tmp_path / "tagged.gguf").loop and gguf_tools.inspect(tmp_path / "out.gguf").loop is None


@pytest.mark.parametrize("command, spec", [("tag", "2-3x2"), ("export", "2-3x2:naive,kv=own")])
def test_commands(command, spec, tiny_llama, tmp_path):
    out = tmp_path / "out.gguf"
    done = edgeloop(command, tiny_llama, out, "--loop", spec)
    assert done.returncode == 0 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert str(out) in done.stderr and ("loop 2-3x2" if command == "tag" else "8 layers") in done.stderr
    expected = out.read_bytes()

    out.write_bytes(b"mine")
    refused = edgeloop(command, tiny_llama, out, "--loop", spec)
    assert refused.returncode == 1 and "exists already" in refused.stderr and "--force" in refused.stderr
    assert out.read_bytes() == b"mine"
    assert edgeloop(command, tiny_llama, out, "--loop", spec, "--force").returncode == 0
    assert out.read_bytes() == expected and list(tmp_path.iterdir()) == [out]


def test_never_in_place(tiny_llama, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(Path(tiny_llama).read_bytes())
    (tmp_path / "link.gguf").symlink_to(model)
    for out in (model, tmp_path / "link.gguf"):
        done = edgeloop("tag", model, out, "--loop", "1-2x2", "--force")
        assert done.returncode == 1 and "is the file that is read" in done.stderr
    assert model.read_bytes() == Path(tiny_llama).read_bytes()


@pytest.mark.parametrize("old", [None, b"mine"])
def test_a_disk_that_becomes_full(demo_model, tmp_path, old):
    """The limit on a file's size fails in the middle of the copy as a full disk does."""
    out = tmp_path / "out.gguf"
    if old:
        out.write_bytes(old)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
    done = edgeloop("tag", demo_model, out, "--loop", "1-2x2", "--force", preexec_fn=limit)
    assert done.returncode == 1 and done.stderr == f"Error: {out}: File too large\n"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([old] if old else [])


def test_a_disk_that_is_too_small(tmp_path):
    """A sparse file that is larger than any disk here."""
    huge = tmp_path / "huge.gguf"
    writer = gguf.GGUFWriter(huge, "llama")
    writer.add_block_count(1)
    writer.add_tensor_info("blk.0.ffn_up.weight", (1 << 20, 1 << 20), np.dtype(np.float32), 4 << 40)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    try:
        os.truncate(huge, (4 << 40) + 4096)
    except OSError:
        pytest.skip("this file system has no files of 4 TB")
    with pytest.raises(WriteError, match="4398.0 GB are needed, .* GB are free"):
        gguf_tools.tag(huge, tmp_path / "out.gguf", "0-0x2")
    assert list(tmp_path.iterdir()) == [huge]


def test_places_that_cannot_be_written(tiny_llama, tmp_path):
    done = edgeloop("tag", tiny_llama, tmp_path / "no" / "out.gguf", "--loop", "1-2x2")
    assert done.returncode == 1 and "No such file or directory" in done.stderr and len(done.stderr.splitlines()) == 1
    done = edgeloop("tag", tiny_llama, tmp_path, "--loop", "1-2x2", "--force")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(demo_model, tmp_path):
    out = tmp_path / "out.gguf"

    def stop(done, total):
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf_tools.tag(demo_model, out, "1-2x2", stop)
    assert not list(tmp_path.iterdir())


def test_progress(demo_model, tmp_path):
    told = []
    gguf_tools.tag(demo_model, tmp_path / "out.gguf", "1-2x2", lambda *numbers: told.append(numbers))
    with GGUFFile(demo_model) as model:
        total = sum(tensor.size for tensor in model.tensors)
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1] == (total, total)
    assert {total for _, total in told} == {total}
    arguments = ["-m", "edgeloop.cli", "tag", demo_model, str(tmp_path / "two.gguf"), "--loop", "1-2x2"]
    child = pexpect.spawn(sys.executable, arguments, cwd="/", dimensions=(24, 120), env=os.environ | {"TERM": "xterm"})
    child.expect(rb"two.gguf .*[\d.]+/[\d.]+ MB")
    child.expect(rb"loop 1-2x2")
    child.expect(pexpect.EOF)
