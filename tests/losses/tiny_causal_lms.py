"""Tiny models of every causal language model that transformers has, made by shrinking the sizes in their configs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

VOCABULARY = 99
MOST_PARAMETERS = 8_000_000

_WIDTH, _INNER, _LAYERS, _HEADS, _HEAD_WIDTH = 32, 48, 2, 4, 8
# By the names that configurations have for them. Only what a configuration has is set.
_SIZES: dict[str, Any] = {
    name: value
    for names, value in (
        ("vocab_size vocab_size_per_layer_input decoder_vocab_size ngram_vocab_size_base", VOCABULARY),
        ("hidden_size d_model n_embd dim embed_dim embedding_size model_dim hidden_dim word_embed_proj_dim", _WIDTH),
        ("input_embedding_size output_embedding_size lru_width attention_hidden_size embedding_dim emb_dim", _WIDTH),
        ("intermediate_size ffn_dim n_inner d_ff ffn_hidden_size feed_forward_size dff dim_ff mlp_hidden_size", _INNER),
        ("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size ffw_dim", _INNER),
        (
            "decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size",
            _INNER,
        ),
        ("moe_shared_expert_intermediate_size shared_experts_intermediate_size", _INNER),
        ("num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers", _LAYERS),
        ("num_encoder_layers num_blocks", _LAYERS),
        ("num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads", _HEADS),
        ("num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads", _HEADS),
        ("linear_num_value_heads linear_num_key_heads linear_num_heads index_n_heads mamba_n_heads", _HEADS),
        ("mamba_num_heads", _HEADS),
        ("num_key_value_heads n_kv_heads num_kv_heads swa_num_key_value_heads num_query_groups", 2),
        ("head_dim kv_channels attention_head_dim attention_head_size v_head_dim global_head_dim", 8),
        (
            "qk_rope_head_dim qk_nope_head_dim index_head_dim linear_key_head_dim linear_value_head_dim",
            _HEAD_WIDTH,
        ),
        ("linear_head_dim swa_head_dim dim_head d_head rotary_dim d_rel", _HEAD_WIDTH),
        ("qk_head_dim", 2 * _HEAD_WIDTH),
        ("kv_lora_rank q_lora_rank o_lora_rank adapter_rank gated_norm_rank loop_gate_rank laurel_rank hc_lowrank", 8),
        ("state_size mamba_d_state ssm_state_size hidden_size_per_layer_input ple_embed_dim router_hidden_size", 8),
        ("mamba_d_head mamba_headdim mamba_head_dim", 2 * _WIDTH // _HEADS),
        ("mamba_d_ssm", 2 * _WIDTH),
        ("n_groups mamba_n_groups mamba_ngroups", 1),
        ("pronunciation_embed_dim shape_embed_dim", 8),
        ("pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab", VOCABULARY),
        ("time_step_rank mamba_dt_rank index_topk rel_extent", 4),
        ("chunk_size mamba_chunk_size block_size sliding_window attention_window_size local_attention", 8),
        ("max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx context_length", 64),
        ("max_target_positions max_source_positions model_max_length", 64),
        ("num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts n_experts", 4),
        ("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts experts_per_token", 2),
        ("n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace", 1),
        ("pad_token_id", 0),
        ("bos_token_id decoder_start_token_id", 1),
        ("eos_token_id", 2),
        ("output_router_logits is_decoder", True),
        ("use_cache", False),
        # what changes logits or the loss: on, and away from where it would not show
        ("logit_scale logits_scaling lm_head_multiplier output_multiplier logits_mup_width_multiplier", 0.5),
        ("final_logit_softcapping logits_soft_cap output_logit_soft_cap", 3.0),
        ("z_loss_coefficient", 0.1),
    )
    for name in names.split()
}
# What a family needs besides, by its model_type.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False,
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8, "layers_block_type": ["mamba", "hybrid"] * 4},
    "zamba2": {"num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A config with every size shrunk that it has under a known name; nested ones too.

    Raises:
        Exception: whatever the class says about such sizes.
    """
    return config_class(**_shrunk(config_class()))


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in _SIZES and not isinstance(value, list | dict):
            if value is not None or name not in ("output_router_logits",):
                values[name] = _SIZES[name]
        elif isinstance(value, list) and len(value) == getattr(config, "num_hidden_layers", -1):
            values[name] = _spread(value)
    for name in config.sub_configs:
        nested = getattr(config, name, None)
        if nested is not None:
            values[name] = {**_shrunk(nested), "model_type": nested.model_type}
    if "qk_rope_head_dim" in values and "num_key_value_heads" in values:  # latent attention has no groups
        values["num_key_value_heads"] = _HEADS
    values |= _EXCEPTIONS.get(config.model_type, {})
    return values


def _spread(per_layer: list[Any]) -> list[Any]:
    """As many entries as layers, of different kinds where there are such."""
    kinds = list({str(entry): entry for entry in per_layer}.values())
    return (kinds * _LAYERS)[:_LAYERS]


def build(config_class: type[PreTrainedConfig], model_class: type[nn.Module]) -> nn.Module:
    """The model, its head's logits spread over some nats.

    Raises:
        Exception: whatever the classes say about such sizes.
        ValueError: there is a size that was not found.
    """
    config = tiny_config(config_class)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters, above {MOST_PARAMETERS:,}: a size under another name")
    torch.manual_seed(0)
    model: Any = model_class(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all() or parameter.abs().max() > 1e4 or "bias" in name:
                parameter.normal_(0, 0.02)
        for parameter in () if head is None else head.parameters():
            parameter.normal_(0, 0.5)
    return model


def causal_lm_classes() -> list[tuple[type[PreTrainedConfig], type[nn.Module]]]:
    """Every config with its model, in the order of the models' names; those that read images besides tokens too."""
    pairs = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for config in mapping:
            models = mapping[config]
            for model in models if isinstance(models, tuple) else (models,):
                own = model.config_class
                pairs[model.__name__] = (own if own in config.sub_configs.values() else config, model)
    return [pairs[name] for name in sorted(pairs)]
