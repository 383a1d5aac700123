"""A decoder on megatron-core's GPTModel, from our configs.

    chunks = build_chunks(cfg.model, cfg.parallel, cfg.precision)   # on all ranks, after runtime.distributed.initialize
    load_hf(chunks, cfg.model, folder)

What GPTModel lacks is in `Decoder`: scaled embeddings and the soft-cap on logits (Gemma 2), scaled RoPE (Llama 3), any vocabulary.
Leaves out: context parallelism. Kernels of Transformer Engine: models/kernels.py.
"""

import math

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tower.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tower.models import kernels, rope
from megatron_tower.models.decoding import Context, PromptContext
from megatron_tower.models.families import family_of
from megatron_tower.models.head import Head, finished
from megatron_tower.models.layer import layer_spec
from megatron_tower.models.mapping import EMBEDDING, HEAD, padded
from megatron_tower.models.norm import RMSNorm
from megatron_tower.runtime.distributed import device


class Decoder(GPTModel):
    """GPTModel of one of our families: embeddings may be scaled, logits soft-capped, RoPE scaled, the vocabulary of any size.

    forward(tokens [batch, seq], position_ids, attention_mask=None, packed_seq_params=None, inference_context=None) returns, on the last
    pipeline stage, logits [batch, seq, padded vocab / tensor-parallel], of a `PromptContext` [1, prompts, ...] after each prompt's last
    token, elsewhere hidden states [seq, batch, hidden]. With `labels`, whose
    values it leaves to the objective, the last stage returns a `Head`, from which these have their log-probabilities without the logits.
    The padding's logits are NEVER, its rows are zero and get no gradient: softmax, sampling and the optimizer do as if it were not there.
    """

    def __init__(self, config: TransformerConfig, layers: TransformerBlockSubmodules, model: ModelConfig, **kwargs: object):
        super().__init__(
            config,
            layers,
            padded(model.vocab_size, config.tensor_model_parallel_size),
            model.max_position_embeddings,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            **kwargs,
        )
        self.rotary_pos_emb.inv_freq = rope.frequencies(model).to(self.rotary_pos_emb.inv_freq.device)
        self.final_softcap = model.final_softcap
        self.fp8 = config.fp8
        if family_of(model.family).scaled_embedding and self.pre_process:
            rounded = torch.tensor(math.sqrt(model.hidden_size), dtype=config.params_dtype).item()  # as HF rounds it
            self.embedding.register_forward_hook(lambda module, inputs, output: output * rounded)
        share = self.vocab_size // config.tensor_model_parallel_size
        self.own_tokens = min(max(model.vocab_size - self.pg_collection.tp.rank() * share, 0), share)  # of this rank, padding not counted
        for name, weight in self.named_parameters():
            if name in (EMBEDDING.megatron, HEAD.megatron):
                weight.data[self.own_tokens :] = 0.0

    def train(self, mode: bool = True) -> "Decoder":
        """FP8 is for training: in evaluation mode (generation, verification, a frozen reference) the same weights compute in bf16,
        for FP8 takes no batch whose tokens are not a multiple of 8, and no noise is wanted there.
        """
        self.config.fp8 = self.fp8 if mode else None
        return super().train(mode)

    def _postprocess(
        self,
        hidden_states: Tensor,
        inference_context: Context | None = None,
        labels: Tensor | None = None,
        **_: object,  # losses and multi-token prediction: objectives see to them
    ) -> Tensor | Head:
        if not self.post_process:
            return hidden_states
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if labels is not None:
            layer = self.output_layer
            for gathered in layer._forward_pre_hooks.values():  # DDP's, which waits for weights of which each rank has updated a part
                gathered(layer, (hidden_states,))
            weight = layer.weight if tied is None else tied
            return Head(hidden_states, weight, self.final_softcap, self.own_tokens, self.pg_collection.tp, layer.sequence_parallel)
        if isinstance(inference_context, PromptContext):
            hidden_states = hidden_states[inference_context.ends]
        logits, _ = self.output_layer(hidden_states, weight=tied)
        return finished(logits, self.final_softcap, self.own_tokens).transpose(0, 1)


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, overlap_tokens: int | None = None
) -> list[Decoder]:
    """This rank's part of the model: one chunk, or `virtual_pipeline` chunks. `overlap_tokens`: that of the config, for training alone."""
    if overlap_tokens:
        kernels.make_buffers(overlap_tokens, model.hidden_size, parallel.tensor, precision)
    return [
        build_model(
            model,
            parallel,
            precision,
            overlap=overlap_tokens is not None,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        )
        for stage in (range(parallel.virtual_pipeline) if parallel.virtual_pipeline else [None])
    ]


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    overlap: bool = False,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> Decoder:
    """One pipeline stage with random weights, on this rank's device. `pre_process`: it has the embedding; `post_process`: the head.

    overlap: linears communicate through the buffers of `kernels.make_buffers`.
    """
    family = family_of(model.family)
    config = transformer_config(model, parallel, precision, overlap)
    layers = [layer_spec(model, family, fused=config.transformer_impl == "transformer_engine")] * get_num_layers_to_build(config, vp_stage)
    return Decoder(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
        model,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    ).to(device())


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, overlap: bool = False
) -> TransformerConfig:
    """Megatron's view of our configs. InputError for a model that the family does not have, or that no back end can run."""
    family = family_of(model.family)
    family.to_hf(model)
    dtype, fused = getattr(torch, precision.params), kernels.transformer_engine(precision)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        softmax_scale=(model.query_scale or model.kv_channels) ** -0.5,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        layernorm_zero_centered_gamma=family.zero_centered_norms,
        gated_linear_unit=True,
        activation_func=family.activation,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=AttnBackend.fused,  # of TE's attention, where it is asked for: cuDNN's kernels or an error
        init_method_std=model.init_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8="hybrid" if precision.fp8 else None,
        fp8_recipe=precision.fp8 or "delayed",
        first_last_layers_bf16=precision.bf16_layers > 0,
        num_layers_at_start_in_bf16=precision.bf16_layers,
        num_layers_at_end_in_bf16=precision.bf16_layers,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=overlap,
        cuda_graph_scope=[],
        calculate_per_token_loss=True,  # objectives return sums; the trainer divides once
        use_cpu_initialization=device().type == "cpu",
        # Equal sums from run to run cost a sorted embedding gradient and TE's fused attention: worth it where fp32 proves something.
        deterministic_mode=device().type == "cuda" and dtype == torch.float32,
        transformer_impl="transformer_engine" if fused else "local",
        apply_rope_fusion=fused,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **RECOMPUTE[parallel.recompute],
    )


RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
