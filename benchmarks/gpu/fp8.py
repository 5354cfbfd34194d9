"""FP8: ten iterations of each recipe beside bfloat16."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.process import Ended
from benchmarks.gpu.step import Context, NotRun, StepError
from benchmarks.gpu.train import TOY, pretrain, script_flags

RECIPES = ("delayed", "tensorwise", "blockwise")
WITHIN = 0.02  # of the loss in bfloat16, at every iteration


def runs() -> dict[str, list[str]]:
    """Flags of each training beside those of all: bfloat16 first, which the others are held against."""
    named: dict[str, list[str]] = {"bfloat16": []}
    for recipe in RECIPES:
        flags = ["--fp8-format", "hybrid", "--fp8-recipe", recipe]
        named[f"{recipe}, padded"] = [*flags, "--moe-router-padding-for-quantization"]
        named[recipe] = flags
    gathered = ["--fp8-param-gather"]
    named["tensorwise, padded, parameters gathered"] = [*named["tensorwise, padded"], *gathered]
    return named


def fp8(context: Context) -> None:
    """All trainings, several at a time on a GPU: it is their start that takes the time."""
    from benchmarks.gpu.layers import has_te

    if not has_te():
        raise NotRun("no Transformer Engine")
    folder = context.out / "fp8.files"
    flags = [*script_flags("dynamic_moe_24l", folder, te=True), *TOY]
    outcome: dict[str, object] = {}

    def train(item: tuple[str, list[str]]) -> None:
        name, extra = item
        label = "fp8." + name.replace(", ", "_").replace(" ", "_")
        save = ["--save", str(folder / label), "--load", str(folder / label), "--save-interval", "100"]
        try:
            rows = pretrain([*flags, *save, *extra], context, label)
            outcome[name] = [row["lm_loss"] for row in rows]
        except (StepError, Ended) as error:
            outcome[name] = str(error)
        context.note(losses=outcome)

    with ThreadPoolExecutor(max_workers=1 if context.cpu else 4) as pool:
        list(pool.map(train, runs().items()))
    judge(context, outcome)


def judge(context: Context, outcome: dict[str, object]) -> None:
    """Every training's losses against those of bfloat16.

    Raises:
        StepError: one failed, is shorter, or further away than :data:`WITHIN`.
    """
    exact = outcome.get("bfloat16")
    if not isinstance(exact, list) or len(exact) < 10:
        raise StepError(f"bfloat16, which the others are held against: {exact}")
    away: dict[str, float] = {}
    wrong: list[str] = []
    for name, losses in outcome.items():
        if not isinstance(losses, list):
            wrong.append(f"{name}: {losses}")
        elif len(losses) != len(exact):
            wrong.append(f"{name}: {len(losses)} iterations of {len(exact)}")
        else:
            each = [abs(a - b) / b for a, b in zip(losses, exact, strict=True)]
            away[name] = max(each)
            if not all(value <= WITHIN for value in each):  # a loss that is no number, which max may pass over, is away
                wrong.append(f"{name}: {away[name]:.1%} away from bfloat16, of {losses}")
    largest = max((value for name, value in away.items() if name != "bfloat16"), default=float("nan"))
    context.note(away=away, says=f"at most {largest:.2%} away from bfloat16")
    if wrong:
        raise StepError("; ".join(wrong)[:900])
