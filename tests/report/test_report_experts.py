"""The picture and the table of a run's experts, from hand-made metrics files."""

import json
import subprocess
import sys

import pytest

from megatron_dynmoe.programs import plot_experts
from megatron_dynmoe.report.experts_plot import FORMATS, active_steps, experts_figure
from megatron_dynmoe.report.experts_table import experts_table
from megatron_dynmoe.report.metrics_file import ReportError, read_run

HEAD = """\
| iteration | layer | removed | added | active after | tokens of the window that visited nobody |
|---:|---:|---|---|---:|---:|
"""


def record(iteration, experts, *, unrouted=None, active=None, changes=()):
    """A line of training: ``experts``, ``unrouted`` and ``active`` by layer, changes (iteration, layer, ...)."""
    fields = {"iteration": iteration, "lm_loss": 4.0, "experts_per_token": sum(experts.values()) / len(experts)}
    fields["experts_per_token_by_layer"] = experts
    if unrouted is not None:
        fields |= {"unrouted_tokens": sum(unrouted.values()) / len(unrouted), "unrouted_tokens_by_layer": unrouted}
    if active is not None:
        names = ("iteration", "layer", "removed", "added", "active", "unrouted")
        fields["active_experts_by_layer"] = active
        fields["expert_changes"] = [dict(zip(names, change, strict=True)) for change in changes]
    return fields


# Layer 1 is dense. The log interval is 2, so the change after iteration 3 is in the record of iteration 4.
ADAPTIVE = [
    record(2, {"0": 1.0, "2": 2.0}, unrouted={"0": 0.5, "2": 0.25}, active={"0": 4, "2": 4}),
    record(
        4,
        {"0": 1.5, "2": 2.5},
        unrouted={"0": 0.25, "2": 0.0},
        active={"0": 4, "2": 3},
        changes=[(3, 0, [0, 4], [0, 2], 4, 30), (3, 2, [7], [], 3, 0)],
    ),
    {"iteration": 4, "validation_loss": 5.0, "experts_per_token": 9.0, "experts_per_token_by_layer": {"0": 9.0}},
    {"iteration": 4, "test_loss": 5.0, "experts_per_token": 9.0, "experts_per_token_by_layer": {"0": 9.0}},
    record(
        6,
        {"0": 2.0, "2": 3.0},
        unrouted={"0": 0.125, "2": 0.0},
        active={"0": 5, "2": 3},
        changes=[(6, 0, [], [1], 5, 12), (6, 2, [], [], 3, 0)],
    ),
]
PLAIN = [record(1, {"0": 2.0, "1": 3.0}), record(2, {"0": 1.0, "1": 2.0})]


def write(path, records):
    path.write_text("".join(json.dumps(fields) + "\n" for fields in records))
    return path


@pytest.fixture
def adaptive(tmp_path):
    return write(tmp_path / "run.jsonl", ADAPTIVE)


def iterations(run):
    return [record.iteration for record in run.records]


def lines_of(axis):
    """Label -> points of the lines of one panel."""
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axis.lines}


def test_table(adaptive):
    assert experts_table(read_run([adaptive])) == HEAD + (
        "| 3 | 0 | 0, 4 | 0, 2 | 4 | 30 |\n"
        "| 3 | 2 | 7 | - | 3 | 0 |\n"
        "| 6 | 0 | - | 1 | 5 | 12 |\n"
        "| 6 | 2 | - | - | 3 | 0 |\n"
    )


def test_free_experts_have_a_panel(tmp_path):
    records = [dict(fields) for fields in PLAIN]
    records[0]["free_tokens_by_layer"] = {"0": {"constant": 0.25, "zero": 0.5}, "1": {"constant": 0.75, "zero": 0.0}}
    records[1]["free_tokens_by_layer"] = {"0": {"constant": 0.5, "zero": 0.5}, "1": {"constant": 0.5, "zero": 0.25}}
    run = read_run([write(tmp_path / "free.jsonl", records)])
    assert run.kinds == ["constant", "zero"]
    experts, free = experts_figure(run).axes[:2]
    assert experts.get_ylabel() == "FFN experts per token"
    lines = lines_of(free)
    assert lines["constant"] == [(1, 0.5), (2, 0.5)]
    assert lines["zero"] == [(1, 0.25), (2, 0.375)]
    assert len(free.lines) == 6  # two kinds: two layers and the mean


def test_a_resumed_run_replaces_what_it_goes_back_over(adaptive, tmp_path):
    """The records of 4 and 6 are of weights that were thrown away, and so are their changes; once in one file too."""
    again = record(4, {"0": 1.1, "2": 2.1}, active={"0": 6, "2": 4}, changes=[(4, 0, [], [3, 5], 6, 8)])
    for paths in (
        [adaptive, write(tmp_path / "more.jsonl", [again])],
        [write(tmp_path / "one.jsonl", [*ADAPTIVE, again])],
    ):
        run = read_run(paths)
        assert iterations(run) == [2, 4]
        assert run.records[-1].experts_by_layer == {0: 1.1, 2: 2.1}
        assert experts_table(run) == HEAD + "| 4 | 0 | - | 3, 5 | 6 | 8 |\n"


def test_an_update_in_an_old_and_a_new_record_counts_once(tmp_path):
    old = record(4, {"0": 1.0}, active={"0": 3}, changes=[(3, 0, [], [1], 3, 7)])
    new = record(5, {"0": 1.0}, active={"0": 2}, changes=[(3, 0, [1], [], 2, 9)])
    run = read_run([write(tmp_path / "run.jsonl", [old, new])])
    assert experts_table(run) == HEAD + "| 3 | 0 | 1 | - | 2 | 9 |\n"


def test_a_file_of_evaluations_may_be_among_the_files_but_not_alone(adaptive, tmp_path):
    untrained = write(tmp_path / "untrained.jsonl", ADAPTIVE[2:3])
    assert iterations(read_run([untrained, adaptive])) == [2, 4, 6]
    with pytest.raises(ReportError, match="no record of training"):
        read_run([untrained])


def test_figure_of_an_adaptive_run(adaptive):
    pytest.importorskip("matplotlib")
    active, experts, unrouted = experts_figure(read_run([adaptive])).axes
    assert active.get_ylabel() == "active experts"
    assert lines_of(active) == {
        "layer 0": [(2, 4), (3, 4), (4, 4), (6, 5)],
        "layer 2": [(2, 4), (3, 3), (4, 3), (6, 3)],
        "added": [(3, 4), (6, 5)],
        "removed": [(3, 4), (3, 3)],
    }
    assert {line.get_drawstyle() for line in active.lines[:2]} == {"steps-post"}
    assert active.lines[0].get_linewidth() > active.lines[1].get_linewidth()  # where they are equal, both are seen
    assert experts.get_ylabel() == "experts per token"
    assert lines_of(experts) == {
        "layer 0": [(2, 1.0), (4, 1.5), (6, 2.0)],
        "layer 2": [(2, 2.0), (4, 2.5), (6, 3.0)],
        "mean": [(2, 1.5), (4, 2.0), (6, 2.5)],
    }
    assert unrouted.get_ylabel() == "tokens that visited nobody"
    assert lines_of(unrouted) == {
        "layer 0": [(2, 0.5), (4, 0.25), (6, 0.125)],
        "layer 2": [(2, 0.25), (4, 0.0), (6, 0.0)],
        "mean": [(2, 0.375), (4, 0.125), (6, 0.0625)],
    }


def test_figure_without_adaptive_experts(tmp_path):
    pytest.importorskip("matplotlib")
    figure = experts_figure(read_run([write(tmp_path / "plain.jsonl", PLAIN)]))
    assert [axis.get_ylabel() for axis in figure.axes] == ["experts per token"]
    assert lines_of(figure.axes[0])["mean"] == [(1, 2.5), (2, 1.5)]


def test_many_layers_are_a_heat_map(tmp_path):
    pytest.importorskip("matplotlib")
    numbers = range(1, 20, 2)  # ten layers
    start = {str(layer): 4 for layer in numbers}
    experts = {str(layer): 1.0 for layer in numbers}
    records = [
        record(10, experts, active=start),
        record(20, experts, active=start),
        record(30, experts, active=start | {"3": 5}, changes=[(25, 3, [], [6], 5, 2)]),
        record(40, experts, active=start | {"3": 5, "19": 3}, changes=[(40, 19, [1], [], 3, 0)]),
    ]
    run = read_run([write(tmp_path / "many.jsonl", records)])
    assert active_steps(run)[3] == {10: 4, 20: 4, 25: 5, 30: 5, 40: 5}
    axis = experts_figure(run).axes[0]
    assert axis.get_ylabel() == "layer"
    (mesh,) = axis.collections
    rows = mesh.get_array().tolist()
    assert rows[1] == [4, 5, 5] and rows[9] == [4, 4, 3]
    assert all(rows[row] == [4, 4, 4] for row in (0, *range(2, 9)))
    # columns: until the first change, until the second, and the last one, which has to have some width
    assert mesh.get_coordinates()[0, :, 0].tolist() == [10, 25, 40, 41]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [str(layer) for layer in numbers]
    assert lines_of(axis) == {"added": [(25, 1)], "removed": [(40, 9)]}


def test_tool_writes_every_kind_and_nothing_else(adaptive, tmp_path):
    pytest.importorskip("matplotlib")
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert set(starts) == set(FORMATS)
    out = tmp_path / "new" / "folder"
    for kind, start in starts.items():
        assert plot_experts.main([str(adaptive), "--output", str(out / f"x.{kind}")]) == 0
        assert (out / f"x.{kind}").read_bytes().startswith(start)
    assert plot_experts.main([str(adaptive), "--output", str(out / "x.PNG"), "--table", str(out / "x.md")]) == 0
    assert (out / "x.md").read_text() == experts_table(read_run([adaptive]))
    assert sorted(path.name for path in out.iterdir()) == ["x.PNG", "x.md", "x.pdf", "x.png", "x.svg"]


def good(**other):
    return json.dumps(PLAIN[0] | other)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["cannot be read", "No such file"]),
        ("", ["no record of training"]),
        (good() + "\n{not json\n", ["line 2", "not a JSON object"]),
        (good() + "\n[1]\n", ["line 2", "not a JSON object"]),
        (b"\xff\xfe", ["not text"]),
        ('{"iteration": 1}', ["line 1", "no experts_per_token"]),
        (good(experts_per_token="many"), ["line 1", "experts_per_token", "'many'"]),
        (good(experts_per_token_by_layer=[1]), ["line 1", "experts_per_token_by_layer", "[1]"]),
        (good(active_experts_by_layer={"a": 1}), ["line 1", "active_experts_by_layer", "'a'"]),
        (good(expert_changes=[{"iteration": 1}]), ["line 1", "'layer' in expert_changes"]),
    ],
)
def test_refusals_of_files(tmp_path, capsys, text, parts):
    file = tmp_path / "run.jsonl"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(capsys, [file, "--output", tmp_path / "x.png"], [str(file), *parts])
    assert not (tmp_path / "x.png").exists()


def refused(capsys, argv, parts):
    """Exit code 1 and one line with all ``parts``."""
    assert plot_experts.main(list(map(str, argv))) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_refusals_of_places(adaptive, tmp_path, capsys):
    picture, before = tmp_path / "x.png", adaptive.read_text()
    refused(capsys, [adaptive, "--output", tmp_path / "x.txt"], ["--output", "'.txt'", ".png, .svg, .pdf"])
    refused(capsys, [adaptive, "--output", tmp_path / "x"], ["--output", "''", ".png"])
    # the log of a run, by a slip, as the place of the table
    refused(capsys, [adaptive, "--output", picture, "--table", adaptive], ["--table", "'.jsonl'", ".md"])
    refused(capsys, [adaptive, adaptive, "--output", picture], [str(adaptive), "begins at iteration 2", "each once"])
    plain = write(tmp_path / "plain.jsonl", PLAIN)
    refused(capsys, [plain, "--output", picture, "--table", tmp_path / "t.md"], ["--moe-adaptive-experts"])
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.md").mkdir()
    refused(capsys, [adaptive, "--output", picture, "--table", tmp_path / "folder.md"], ["folder.md", "is a folder"])
    refused(capsys, [adaptive, "--output", adaptive / "x.png"], [str(adaptive), "cannot be written"])
    assert adaptive.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.md", "plain.jsonl", "run.jsonl"]


def test_without_matplotlib(adaptive, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what an import then finds is nothing
    argv = [adaptive, "--output", tmp_path / "x.png", "--table", tmp_path / "x.md"]
    refused(capsys, argv, ["needs matplotlib", "'plots'"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]


def test_reading_needs_neither_torch_nor_megatron_nor_matplotlib():
    code = "import sys, tools.plot_experts; print(*{'torch', 'megatron', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
