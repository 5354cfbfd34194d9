"""Train a tiny stock megatron GPT mixture of experts through ``megatron.training.pretrain``.

Nothing of this package is in the model but the norm, so that what fails here is ``megatron_dynmoe.host``, not a router.
By hand: ``torchrun --nproc-per-node 2 tests/host_smoke.py --expert-model-parallel-size 2``; every flag is megatron's.
"""

import sys

import torch

from megatron_dynmoe import host

SEQ, VOCAB = 32, 128
FLAGS = f"""
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length {SEQ}
    --max-position-embeddings {SEQ} --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --vocab-size {VOCAB} --make-vocab-size-divisible-by 8
    --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01
    --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-3 --eval-iters 1 --eval-interval 4
    --log-interval 1 --num-workers 0 --tokenizer-type NullTokenizer --ckpt-format torch_dist
""".split()


class CountingDataset(torch.utils.data.Dataset):
    """Sequences that count upwards modulo the vocabulary: learnable, and the same on each rank."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = (torch.arange(SEQ + 1) + 7 * index) % VOCAB
        return {"tokens": text[:-1], "labels": text[1:]}


def datasets(train_val_test_num_samples, vp_stage=None):
    return tuple(CountingDataset() for _ in range(3))


datasets.is_distributed = True  # build them on each rank: they cost nothing


def loss_func(output):
    loss = output.float().mean()
    print(f"\nloss {loss.item().hex()}", flush=True)  # exact, for the comparison of runs
    return loss, {"lm loss": loss.detach().clone()}


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    tokens, labels = batch["tokens"].cuda(non_blocking=True), batch["labels"].cuda(non_blocking=True)
    positions = torch.arange(SEQ, device=torch.cuda.current_device()).expand_as(tokens)
    return model(tokens, positions, None, labels=labels), loss_func


def layer_spec(config, vp_stage=None):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megatron_dynmoe.mcore.norm import replace_norms

    spec = get_gpt_decoder_block_spec(
        config.transformer, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    return replace_norms(spec)


def main(argv: list[str]) -> None:
    host.enable()
    sys.argv[1:] = [*host.default_flags(), *FLAGS, *argv]

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    model = gpt_config_from_args(args)
    model.transformer_layer_spec = layer_spec
    pretrain(pretrain_cfg_container_from_args(args, model), datasets, ModelType.encoder_or_decoder, forward_step)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
