"""What stands for a shard: files, folders, globs and links; and what has a shard's name and is none."""

import os
import socket
from pathlib import Path

import pytest

from megatron_dynmoe.data.errors import DataError
from megatron_dynmoe.data.shards import expand_inputs, read_batches


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}')
    return path


@pytest.mark.parametrize("where", ["in a folder", "by name", "by glob"])
@pytest.mark.parametrize(
    "kind, reason",
    [
        ("pipe", "is a named pipe; accepted: a file"),
        ("folder", "is a folder without shards; accepted: a file"),
        ("link", r"cannot be read \(a link to gone\): No such file or directory; accepted: a file"),
        ("circle", r"cannot be read \(a link to x\.jsonl\): Too many levels of symbolic links"),
        ("socket", "is a socket; accepted: a file"),
    ],
)
def test_what_is_no_file(kind, reason, where, shard, tmp_path, monkeypatch):
    if kind == "folder" and where == "by name":
        reason = "the folder holds no training shard"
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    shard.rename("in/good.jsonl")
    odd = Path("in/x.jsonl")
    made = {
        "pipe": lambda: os.mkfifo(odd),
        "folder": odd.mkdir,
        "link": lambda: odd.symlink_to("gone"),
        "circle": lambda: odd.symlink_to("x.jsonl"),
        "socket": lambda: socket.socket(socket.AF_UNIX).bind(str(odd)),
    }
    made[kind]()
    item = {"in a folder": "in", "by name": str(odd), "by glob": "in/*.jsonl"}[where]
    with pytest.raises(DataError, match=rf"in/x\.jsonl: {reason}"):
        expand_inputs([item])


def test_folders_with_the_names_of_shards_and_links_are_entered(shard, tmp_path):
    (tmp_path / "in" / "part.jsonl").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    shard.rename(tmp_path / "in" / "part.jsonl" / "0.jsonl")  # as Spark writes
    (tmp_path / "elsewhere" / "1.jsonl").write_text('{"text": "a"}')
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    found = expand_inputs([tmp_path / "in"])
    assert [str(p.relative_to(tmp_path / "in")) for p in found] == ["linked/1.jsonl", "part.jsonl/0.jsonl"]


def test_an_unreadable_shard_is_named(shard, monkeypatch):
    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"in\.jsonl: cannot be read \(Permission denied\)"):
        list(read_batches(shard))
