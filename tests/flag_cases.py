"""Command lines that no run should be started with, and how they are tried: all in one process, none of them trains."""

from __future__ import annotations

import contextlib
import io
import json
import socket
from pathlib import Path
from typing import Any
from unittest import mock

# One a line; after " -> " what the sentence must contain, "accepted" where Megatron makes sense of it.
CASES = """
--no-such-flag 3 -> --no-such-flag
--num-layer 4 -> --num-layer
stray words -> stray
--num-layers -> --num-layers
--num-layers four -> 'four'
--num-layers 4.0 -> '4.0'
--lr fast -> 'fast'
--bf16 yes -> yes
--lr-decay-style wobbly -> 'wobbly'
--optimizer magic -> 'magic'
--position-embedding-type nowhere -> 'nowhere'
--normalization none -> 'none'
--ckpt-format zip -> 'zip'
--dataloader-type random -> 'random'
--recompute-granularity some -> 'some'
--moe-token-dispatcher-type pigeon -> 'pigeon'
--moe-router-load-balancing-type luck -> 'luck'
--moe-gate iron -> iron
--moe-rule first -> first
--moe-preset dynamic -> dynamic-moe
--moe-expert-backend abacus -> abacus
--moe-dispatch-unit bit -> bit
--moe-top-p 1.5 -> [0, 1]
--moe-top-p nan -> --moe-top-p
--moe-router-topk 0 -> --moe-router-topk
--moe-rule top-k --moe-router-topk 9 -> --moe-router-topk
--moe-max-experts-per-token 0 -> --moe-max-experts-per-token
--moe-max-rows -1 -> --moe-max-rows
--moe-entropy-coeff -1 -> --moe-entropy-coeff
--moe-entropy-coeff inf -> --moe-entropy-coeff
--moe-aux-loss-coeff 1 2 -> --moe-aux-loss-coeff
--moe-aux-loss-coeff -1 -> --moe-aux-loss-coeff
--moe-z-loss-coeff -1 -> --moe-z-loss-coeff
--moe-input-jitter-eps 2 -> --moe-input-jitter-eps
--moe-zero-experts -1 -> --moe-zero-experts
--moe-zero-experts 1000000000 -> --moe-zero-experts
--num-experts 1000000000 -> --num-experts
--moe-max-rows-per-token 1e308 -> --moe-max-rows-per-token
--moe-rule top-any -> --moe-gate cosine
--moe-adaptive-experts -> --moe-adaptive-experts
--moe-initial-experts 2 -> --moe-adaptive-experts
--moe-preset dynmoe --moe-update-at 0 -> --moe-update-at
--moe-preset dynmoe --moe-gating-residual -> --moe-adaptive-experts
--moe-residual --moe-shared-expert-overlap -> --moe-shared-expert-overlap
--moe-layer-freq 0 -> --moe-layer-freq
--moe-layer-freq -2 -> --moe-layer-freq
--moe-layer-freq [0]*4 -> at least one 1
--moe-layer-freq [1,2,3,4] -> --moe-layer-freq
--moe-layer-freq [1,0] -> --moe-layer-freq
--moe-layer-freq [1]* -> --moe-layer-freq
--moe-layer-freq ([1]*9)**9**9 -> --moe-layer-freq
--moe-layer-freq [1]*99999999999 -> --moe-layer-freq
--moe-layer-freq __import__('os') -> --moe-layer-freq
--no-rope-freq ([0]*2 -> --no-rope-freq
--no-rope-freq [1,1] -> --no-rope-freq
--num-layers 0 -> --num-layers
--num-layers -4 -> --num-layers
--hidden-size 0 -> --hidden-size
--hidden-size 30 -> --hidden-size
--ffn-hidden-size 0 -> --ffn-hidden-size
--num-attention-heads 0 -> --num-attention-heads
--num-attention-heads 5 -> --num-attention-heads
--kv-channels 0 -> --kv-channels
--group-query-attention --num-query-groups 3 -> --num-query-groups
--group-query-attention --num-query-groups 0 -> --num-query-groups
--seq-length 0 -> --seq-length
--seq-length 64 -> --max-position-embeddings
--max-position-embeddings 8 -> --max-position-embeddings
--vocab-size 0 -> --vocab-size
--vocab-size -3 -> --vocab-size
--make-vocab-size-divisible-by 0 -> --make-vocab-size-divisible-by
--num-experts 0 -> --num-experts
--num-experts -4 -> --num-experts
--moe-ffn-hidden-size 0 -> --moe-ffn-hidden-size
--moe-shared-expert-intermediate-size 0 -> --moe-shared-expert-intermediate-size
--micro-batch-size 0 -> --micro-batch-size
--micro-batch-size 3 -> micro-batch-size
--micro-batch-size 9 --eval-micro-batch-size 1 -> --global-batch-size
--global-batch-size 0 -> --global-batch-size
--global-batch-size 7 -> global-batch-size
--eval-micro-batch-size 0 -> --eval-micro-batch-size
--batch-size 4 -> --batch-size
--train-iters -1 -> --train-iters
--train-iters 5 --train-samples 7 -> --train-samples
--train-samples 0 -> --train-samples
--lr -1 -> --lr
--lr nan -> --lr
--lr inf -> --lr
--min-lr 1 -> lr
--lr-warmup-iters -1 -> --lr-warmup-iters
--lr-warmup-iters 5 --lr-warmup-fraction 0.1 -> --lr-warmup-iters
--lr-warmup-fraction 2 -> --lr-warmup-fraction
--lr-decay-style WSD -> accepted
--warmup 3 -> --warmup
--weight-decay -1 -> --weight-decay
--weight-decay-incr-style linear -> weight-decay
--clip-grad -1 -> --clip-grad
--clip-grad nan -> --clip-grad
--adam-beta1 1.0 -> --adam-beta1
--adam-beta2 -1 -> --adam-beta2
--adam-eps 0 -> --adam-eps
--init-method-std -1 -> --init-method-std
--attention-dropout 1 -> --attention-dropout
--hidden-dropout -0.1 -> --hidden-dropout
--rotary-base 0 -> --rotary-base
--rotary-percent 0 -> --rotary-percent
--seed 0 -> --seed
--log-interval 0 -> --log-interval
--eval-interval 0 -> --eval-interval
--eval-iters -1 -> --eval-iters
--save-interval -1 -> --save-interval
--exit-interval -1 -> --exit-interval
--tensorboard-log-interval 0 -> --tensorboard-log-interval
--log-memory-interval 0 -> --log-memory-interval
--num-workers -1 -> --num-workers
--save-tokens-per-expert-interval 1 -> --save-tokens-per-expert-interval
--save-activations-interval 1 -> --save-activations-interval
--tensor-model-parallel-size 0 -> --tensor-model-parallel-size
--tensor-model-parallel-size 2 -> --tensor-model-parallel-size
--tensor-model-parallel-size 3 -> --tensor-model-parallel-size
--pipeline-model-parallel-size 0 -> --pipeline-model-parallel-size
--pipeline-model-parallel-size 2 -> world size
--context-parallel-size 0 -> --context-parallel-size
--context-parallel-size 2 -> cannot be honoured
--expert-model-parallel-size 0 -> --expert-model-parallel-size
--expert-model-parallel-size 3 -> --num-experts
--expert-model-parallel-size 2 -> world size
--expert-tensor-parallel-size 0 -> --expert-tensor-parallel-size
--expert-tensor-parallel-size 2 -> world size
--num-layers-per-virtual-pipeline-stage 1 -> pipeline
--num-virtual-stages-per-pipeline-rank 2 -> pipeline
--pipeline-model-parallel-layout E|t -> pipeline
--model-parallel-size 2 -> --model-parallel-size
--overlap-param-gather -> --overlap-param-gather
--overlap-param-gather --overlap-grad-reduce -> distributed optimizer
--overlap-moe-expert-parallel-comm -> overlap
--delay-wgrad-compute -> --delay-wgrad-compute
--sequence-parallel -> accepted
--bf16 --fp16 -> --fp16
--fp8-format wide -> 'wide'
--fp8-format hybrid -> transformer-engine
--fp8-param-gather -> fp8
--fp4-format e2m1 -> --fp4
--fp16-lm-cross-entropy -> --fp16
--fp32-residual-connection -> --fp32-residual-connection
--accumulate-allreduce-grads-in-fp32 -> accepted
--grad-reduce-in-bf16 -> accepted
--use-precision-aware-optimizer -> precision
--main-grads-dtype bf16 -> --main-grads-dtype
--exp-avg-dtype fp16 -> --exp-avg-dtype
--optimizer muon -> --optimizer
--optimizer soap -> --optimizer
--optimizer-cpu-offload -> --use-precision-aware-optimizer
--optimizer-offload-fraction 7 -> --optimizer-offload-fraction
--recompute-granularity full -> --recompute-method
--recompute-granularity full --recompute-method uniform -> --recompute-num-layers
--recompute-granularity full --recompute-method block --recompute-num-layers 0 -> --recompute-num-layers
--recompute-granularity selective --recompute-modules nothing -> recompute
--recompute-granularity selective --recompute-modules moe_act -> moe_act
--recompute-activations --recompute-granularity full --recompute-method uniform -> recompute
--checkpoint-activations -> --checkpoint-activations
--distribute-saved-activations -> --tensor-model-parallel-size
--cuda-graph-impl local -> cuda-graph
--cuda-graph-impl nonsense -> 'nonsense'
--cuda-graph-modules moe --cuda-graph-impl local -> cuda-graph
--cuda-graph-modules nothing -> --cuda-graph-modules
--enable-cuda-graph -> cuda
--cpu-offloading-num-layers 9 -> --cpu-offloading-num-layers
--fine-grained-activation-offloading -> offload
--transformer-impl transformer_engine -> --transformer-impl
--transformer-impl inference_optimized -> --transformer-impl
--experimental-attention-variant gated_delta_net -> --linear-attention-freq
--experimental-attention-variant nothing -> experimental
--multi-latent-attention --group-query-attention --num-query-groups 2 -> group
--apply-query-key-layer-scaling -> accepted
--squared-relu -> --swiglu
--quick-geglu -> --swiglu
--qk-clip -> qk
--softmax-type twice -> 'twice'
--window-size 4 -> --window-size
--mtp-num-layers -1 -> --mtp-num-layers
--use-mup -> accepted
--moe-router-num-groups 2 --moe-router-group-topk 1 -> --moe-router-num-groups
--moe-router-enable-expert-bias -> expert
--moe-router-topk-scaling-factor 2 -> --moe-router-topk-scaling-factor
--moe-router-score-function sigmoid -> --moe-router-score-function
--moe-router-fusion -> --moe-router-fusion
--moe-router-force-load-balancing -> --moe-router-force-load-balancing
--moe-router-force-biased 1.0 -> --moe-router-force-biased
--moe-enable-routing-replay -> --moe-enable-routing-replay
--moe-apply-probs-on-input -> --moe-apply-probs-on-input
--moe-latent-size 8 -> --moe-latent-size
--moe-expert-capacity-factor 1.0 -> --moe-expert-capacity-factor
--moe-pad-expert-input-to-capacity -> --moe-expert-capacity-factor
--moe-paged-stash -> --moe-paged-stash
--moe-expert-rank-capacity-factor 1.0 -> moe-expert-rank-capacity-factor
--moe-enable-deepep -> flex
--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep -> --moe-flex-dispatcher-backend
--moe-single-grouped-weight -> moe-single-grouped-weight
--moe-use-upcycling -> --moe-use-upcycling
--use-megatron-fsdp -> --ckpt-format
--use-megatron-fsdp --use-torch-fsdp2 -> fsdp
--ckpt-step -1 -> --ckpt-step
--use-checkpoint-args -> --load
--load /nonexistent --use-checkpoint-args -> accepted
--non-persistent-ckpt-type global -> accepted
--async-save -> accepted
--async-save --ckpt-format torch -> accepted
--ckpt-convert-format torch_dist -> --ckpt-convert-save
--exit-on-missing-checkpoint -> accepted
--auto-detect-ckpt-format -> accepted
--data-path /nonexistent --train-data-path /nonexistent -> data-path
--mock-data --data-path x -> data
--fim-data -> fim
--split 1,2 -> accepted
--tokenizer-type Nonsense -> Nonsense
--tokenizer-type HuggingFaceTokenizer --tokenizer-model /nonexistent -> --tokenizer-model
--tokenizer-type SentencePieceTokenizer --tokenizer-model /nonexistent -> /nonexistent
--tokenizer-type SentencePieceTokenizer -> tokenizer
--spec a b -> --spec
--yaml-cfg /nonexistent -> --yaml-cfg
--hybrid-layer-pattern M -> --hybrid-layer-pattern
--heterogeneous-layers-config-path /nonexistent -> --heterogeneous-layers-config-path
--perform-rl-step -> --perform-rl-step
--vision-pretraining -> --vision-pretraining
--inprocess-restart -> --inprocess-restart
--openai-gelu -> --openai-gelu
--apply-residual-connection-post-layernorm -> --apply-residual-connection-post-layernorm
--enable-msc -> --enable-msc
--decoder-first-pipeline-num-layers 9 -> pipeline
--encoder-num-layers 4 -> encoder
--encoder-seq-length 32 -> encoder
--rampup-batch-size 1 2 -> --rampup-batch-size
--rampup-batch-size 8 8 100 -> --step-batch-size-schedule
--step-batch-size-schedule nonsense -> --step-batch-size-schedule
--step-batch-size-schedule 0:3,10:8 -> batch
--iterations-to-skip x -> --iterations-to-skip
--profile-ranks x -> --profile-ranks
--profile --profile-step-start -5 -> --profile-step-start
--save-interval 1 --save /dev/null/x -> /dev/null
--save-interval 1 --save /proc/nonsense -> /proc/nonsense
--tensorboard-dir /proc/nonsense -> /proc/nonsense
--data-cache-path /proc/nonsense -> /proc/nonsense
--moe-metrics-file /proc/nonsense/x -> /proc/nonsense
--moe-metrics-file /tmp -> /tmp
--moe-metrics-file {long} -> File name too long
--save-interval 1 --save {long} -> File name too long
--moe-routing-trace-path /proc/nonsense -> cannot be honoured
--log-energy -> accepted
--distributed-backend carrier-pigeon -> 'carrier-pigeon'
--distributed-timeout-minutes 0 -> --distributed-timeout-minutes
--local-rank x -> --local-rank
"""


last_config: Any = None  # of the command line that was accepted last


def cases() -> list[tuple[list[str], str]]:
    """(flags, what the answer must contain)."""
    lines = [line.split(" -> ") for line in CASES.replace("{long}", f"/tmp/{'x' * 300}").strip().splitlines()]
    return [(flags.split(), expected) for flags, expected in lines]


def try_all(base: list[str], answers: str) -> None:
    """Write each case's (exit code, what was said) to the file ``answers``; code 0: accepted.

    Under "cases" in the order of :func:`cases`, under "errors" what is said of exceptions, under "help" of ``--help``.
    """
    tried: dict[str, Any] = {"cases": [attempt([*base, *flags]) for flags, _ in cases()], "errors": said_of_errors()}
    tried["help"] = attempt(["--help"])
    Path(answers).write_text(json.dumps(tried))


def said_of_errors() -> dict[str, tuple[int, str]]:
    """Exceptions as a run meets them, and exit code and stderr of what is said."""
    import torch

    from megatron_dynmoe.training import report_failure
    from megatron_dynmoe.training.failures import describe as describe_error
    from megatron_dynmoe.training.log import MetricsFile

    def unwritable() -> None:
        Path("/proc/nonsense").mkdir()

    def full() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    def full_metrics() -> None:
        with mock.patch("megatron_dynmoe.training.log.is_last_rank", return_value=True):
            MetricsFile("/dev/full").write({})

    def of_torch() -> None:
        torch.optim.SGD([torch.ones(1, requires_grad=True) * 2], lr=1)

    def connection() -> None:
        socket.create_connection(("127.0.0.1", 1))

    said = {}
    for raising in (unwritable, full, full_metrics, of_torch, connection):
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            try:
                raising()
            except Exception as error:
                said[raising.__name__] = (report_failure.say(*describe_error(error)), stderr.getvalue())
    return said


def attempt(argv: list[str]) -> tuple[int, str]:
    """Exit code and stderr of the entry, up to the point where it would start."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import unset_global_variables

    from megatron_dynmoe.training import report_failure
    from megatron_dynmoe.training.command_line import read_flags
    from megatron_dynmoe.training.failures import describe as describe_error
    from megatron_dynmoe.training.pretrain import pretrain_config

    said, other = io.StringIO(), io.StringIO()
    code: Any = 0
    global last_config
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(other):
        try:
            last_config = pretrain_config(*read_flags(argv)[:2])
        except SystemExit as exit:
            code = exit.code
        except Exception as error:
            code = report_failure.say(*describe_error(error))
        finally:
            unset_global_variables()
            with contextlib.suppress(AttributeError):
                unset_num_microbatches_calculator()
    return code, said.getvalue() + (other.getvalue() if argv == ["--help"] else "")


def describe(base: list[str], options: list[str], folder: str) -> None:
    """Write Megatron's flags to ``folder``: by name their options, and what the entry says to each of ``options``."""
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    from megatron_dynmoe.training.refused import REFUSED

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False, add_help=False))
    kitchen = {action for group in parser._action_groups if group.title == "kitchen" for action in group._group_actions}
    flags: dict[str, list[str]] = {}
    for action in parser._actions:
        if action not in kitchen:  # of a library that is not Megatron's
            flags.setdefault(action.dest, []).extend(action.option_strings)
    refused = {a.dest: attempt([*base, *given(a)]) for a in parser._actions if set(options) & set(a.option_strings)}
    attempt([*base, "--use-rope-scaling", "--rope-scaling-factor", "4"])
    told = {"rope_scaling_factor": last_config.model.rope_scaling_factor}
    written = {"flags": flags, "refused": refused, "reasons": REFUSED, "told": told}
    Path(folder, "flags.json").write_text(json.dumps(written))


def given(action: Any) -> list[str]:
    """A command line that gives the flag, with another value than its default."""
    option = next(name for name in action.option_strings if name.startswith("--"))
    if action.nargs == 0:
        return [option]
    value = next((str(choice) for choice in action.choices or () if choice != action.default), "7")
    return [option, *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]
