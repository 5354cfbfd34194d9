"""The sizes of a LLaMA-style MoE model: what training logs of its parameters and what the plan lays out over ranks."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Enough of a model (RMSNorm, no biases, rotary positions) to count its parameters.

    Attributes:
        moe: for each layer, those for multi-token prediction included, whether it has experts.
        width: D. heads, head_width, query_groups: attention.
        dense_width: of the dense feed-forward part. expert_width: F. experts: E. shared_width: of the shared expert, 0
            for none.
        vocabulary: rows of the embedding.
        router_extra: parameters that a layer's router, mixer and zero-computation experts have beside the router's
            weight [E, D].
        mtp_layers: the last of the layers, which are for multi-token prediction; each has three more norms and a
            projection of hidden state and embedding, side by side.
        gated: SwiGLU (three matrices) or two. tied: output layer shares the embedding.
        query_key_norms: a norm over a head's width for queries and one for keys, shared by heads (``--qk-layernorm``).
    """

    moe: tuple[bool, ...]
    width: int
    heads: int
    head_width: int
    query_groups: int
    dense_width: int
    expert_width: int
    experts: int
    vocabulary: int
    shared_width: int = 0
    router_extra: int = 0
    mtp_layers: int = 0
    gated: bool = True
    tied: bool = False
    query_key_norms: bool = False

    @classmethod
    def from_args(cls, args: Namespace, **more: Any) -> Self:
        """The model that Megatron's flags describe.

        Args:
            args: with ``ffn_hidden_size`` set, and ``moe_layer_freq`` a number or a sequence, as Megatron parses it.
            more: the fields that no flag says: the vocabulary, and what only a subclass has.
        """
        every, layers = args.moe_layer_freq, range(args.num_layers)
        pattern = [layer % every == 0 for layer in layers] if isinstance(every, int) else list(map(bool, every))
        mtp_layers = args.mtp_num_layers or 0
        if mtp_layers and args.mtp_use_repeated_layer:
            mtp_layers = 1
        pattern += pattern[-1:] * mtp_layers  # they are as the decoder's last layer
        return cls(
            moe=tuple(pattern) if args.num_experts else (False,) * len(pattern),
            width=args.hidden_size,
            heads=args.num_attention_heads,
            head_width=args.kv_channels or args.hidden_size // args.num_attention_heads,
            query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
            dense_width=args.ffn_hidden_size,
            expert_width=args.moe_ffn_hidden_size or args.ffn_hidden_size,
            experts=args.num_experts or 0,
            shared_width=args.moe_shared_expert_intermediate_size or 0,
            mtp_layers=mtp_layers,
            gated=args.swiglu,
            tied=not args.untie_embeddings_and_output_weights,
            query_key_norms=args.qk_layernorm,
            **more,
        )

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return len(self.moe)

    @property
    def attention(self) -> int:
        """Parameters of one attention part: queries, keys, values and the projection back."""
        return 2 * self.width * self.head_width * (self.heads + self.query_groups)

    @property
    def norms(self) -> int:
        """Parameters of one layer's norms."""
        return 2 * (self.width + self.head_width * self.query_key_norms)

    @property
    def router(self) -> int:
        """Parameters of one MoE layer beside its FFN experts and the shared one."""
        return self.experts * self.width + self.router_extra

    @property
    def matrices(self) -> int:
        """Matrices of one feed-forward part."""
        return 3 if self.gated else 2

    def feed_forward(self, width: int) -> int:
        """Parameters of one feed-forward part of ``width``."""
        return self.matrices * self.width * width

    @property
    def per_expert(self) -> int:
        """Parameters of one expert."""
        return self.feed_forward(self.expert_width)

    @property
    def without_experts(self) -> int:
        """Parameters that every token uses: embeddings, attention, norms, routers, dense and shared parts."""
        moe = sum(self.moe)
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.width
        layers = self.layers * (self.attention + self.norms) + self.width  # the last norm
        dense = (self.layers - moe) * self.feed_forward(self.dense_width)
        sparse = moe * (self.router + self.feed_forward(self.shared_width))
        return embeddings + layers + dense + sparse + self.mtp_layers * (3 + 2 * self.width) * self.width

    @property
    def total(self) -> int:
        """All parameters."""
        return self.without_experts + sum(self.moe) * self.experts * self.per_expert

    def activated(self, experts_per_token: float) -> float:
        """Parameters that a token uses on average when it visits ``experts_per_token`` experts a layer."""
        return self.without_experts + sum(self.moe) * experts_per_token * self.per_expert
