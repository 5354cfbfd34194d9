"""Methods by name: what one brings is found everywhere, and nobody else has a list of them."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_dynmoe.config import DynMoEConfig
from megatron_dynmoe.planning import PlanError
from megatron_dynmoe.planning.flags import model_of, read_flags
from megatron_dynmoe.routers import GATES, RULES, register_preset, register_rule
from megatron_dynmoe.routers.registry import methods
from megatron_dynmoe.routers.router_config import all_fields
from megatron_dynmoe.routers.settings import Settings, setting

ROOT = Path(__file__).resolve().parents[2]
# The same word for something else: Megatron's score function, Megatron's learning-rate schedule.
OTHERS = {("megatron_dynmoe/mcore/checks.py", "softmax"), ("megatron_dynmoe/demo/steps.py", "cosine")}
# Exports from before there were gates say none.
OTHERS |= {("tools/token_report.py", "softmax")}
# A benchmark says which of them it measures: rule="top-k".
CHOICES = ("rule", "gate")


def words(path: Path) -> set[str]:
    """Strings in a file's code, without those that choose a method by keyword."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    chosen = {id(word.value) for word in ast.walk(tree) if isinstance(word, ast.keyword) and word.arg in CHOICES}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {node.value for node in constants if id(node) not in chosen}


def test_nobody_else_knows_a_method_by_name():
    names = {*GATES, *RULES}
    found = set()
    for folder in ("megatron_dynmoe", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            where = path.relative_to(ROOT).as_posix()
            if not where.startswith(("megatron_dynmoe/routers/", "megatron_dynmoe/hf/")):
                found |= {(where, word) for word in words(path) & names}
    assert found - OTHERS == set()


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'switch' is registered already"):
        register_preset("switch", {})
    with pytest.raises(ValueError, match="'top_p', which another method has differently"):

        @dataclass(frozen=True, kw_only=True)
        class Other(Settings):
            """Means something else."""

            top_p: float = setting(0.9)
            """Another."""

        register_rule("other", settings=Other)(lambda scores, config: scores > 0)
    assert "other" not in RULES


def test_a_setting_that_every_router_has_is_not_a_methods():
    @dataclass(frozen=True, kw_only=True)
    class Clash(Settings):
        """Its tau would never be read."""

        tau: float = setting(0.1)
        """Another."""

    register_rule("clash", settings=Clash)(lambda scores, config: scores > 0)
    try:
        with pytest.raises(ValueError, match="Clash has a setting 'tau', which every router has"):
            DynMoEConfig(rule="clash", tau=0.5)
    finally:
        del RULES["clash"]


def test_every_method_and_setting_says_what_it_is():
    for _, name, method in methods():
        assert 10 < len(method.about) < 120 and method.about.endswith("."), name
    for field in all_fields(DynMoEConfig):
        assert set(field.metadata) >= {"training"} or field.name in ("gate", "rule"), field.name


MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-experts 8 --ffn-hidden-size 128 "
MODEL += "--vocab-size 100 --seq-length 32 --micro-batch-size 1 --global-batch-size 8 "


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--moe-preset dynamic-moe --moe-rule top-k", None),
        ("--moe-preset dynmoe --moe-gate softmax --moe-rule top-p", None),
        ("--moe-rule top-k --moe-top-p 0.3", "--moe-top-p"),
        ("--moe-preset dynamic-moe --moe-rule top-k --moe-top-p 0.3", "--moe-top-p"),
        ("--moe-cosine-scale 2", "--moe-gate cosine"),
    ],
)
def test_the_planner_refuses_what_nobody_reads(tmp_path, flags, said):
    (tmp_path / "model.args").write_text(MODEL + flags)
    args = read_flags(tmp_path / "model.args")
    if said is None:
        assert model_of(args).routing.rule == flags.split()[-1]
    else:
        with pytest.raises(PlanError, match=said):
            model_of(args)


@pytest.fixture
def halves():
    """A rule as a plug-in would bring it: columns whose score is at least half of the best one's."""

    @register_rule("halves", parameters=lambda config, columns, width: {"bias": torch.zeros(columns)})
    def halves_map(scores_TE, config, parameters):
        """At least half of the best score."""
        return scores_TE + parameters["bias"] >= scores_TE.amax(dim=-1, keepdim=True) / 2

    yield
    del RULES["halves"]


def test_a_rule_from_elsewhere_is_planned(halves):
    from megatron_dynmoe.planning.fresh import fresh_k
    from megatron_dynmoe.planning.memory import moe_token_bytes
    from tests.planning.test_plan_scripts import shape

    # Small logits: all scores are at least half of the best one's. With a weight of deviation 10 the softmax has one
    # score above a half for nearly every token.
    flat, peaked = (fresh_k(shape(DynMoEConfig(rule="halves"), init_std=std)) for std in (1e-4, 10.0))
    assert flat == 16 and 1 <= peaked < 1.1
    config = DynMoEConfig(rule="halves")
    assert moe_token_bytes(shape(config)) == moe_token_bytes(shape(DynMoEConfig()))  # scores, map, input
    plain = DynMoEConfig(rule="top-k")
    assert config.parameters_beside(16, 1024) == plain.parameters_beside(16, 1024) + 16
