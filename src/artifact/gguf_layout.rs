//! How llama.cpp lays a LLaMA out: the names of its tensors, and the order of the rows of q and k.

/// Row `i` of Hugging Face's order is this row of llama.cpp's: within a head of `D` rows, `d` of the first half stands
/// at `2 d`, `d` of the second half at `2 d + 1`.
pub(super) fn halves_apart(rows: usize, heads: usize) -> Vec<usize> {
    let size = rows / heads;
    let half = size / 2;
    let place = |row: usize| {
        let (head, d) = (row / size, row % size);
        head * size + if d < half { 2 * d } else { 2 * (d - half) + 1 }
    };
    (0..rows).map(place).collect()
}

/// The other way round: row `i` of llama.cpp's order is this row of Hugging Face's, in a q or k of so many heads.
pub fn interleaved(rows: usize, heads: usize) -> Vec<usize> {
    let mut order = vec![0; rows];
    for (theirs, ours) in halves_apart(rows, heads).into_iter().enumerate() {
        order[ours] = theirs;
    }
    order
}

/// What llama.cpp divides frequencies by, `(D / 2)`; Hugging Face has a rule in the configuration.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// llama.cpp's name of a Hugging Face tensor.
pub fn gguf_name(name: &str) -> Option<String> {
    let whole = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        ROPE_FACTORS => Some(ROPE_FACTORS),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.into());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{module}.{kind}"))
}
