//! A PEFT adapter with fewer ranks: `A[:r]` and `B[:, :r]` for the plain base, in the base's own channel order.
//!
//! PEFT scales each module by its own `alpha / r`. LoNAS's scale is `alpha / R` for every active rank, so a module that
//! keeps `r` of `R` gets `r` in `rank_pattern` and `alpha r / R` in `alpha_pattern`.

use super::{CARD, ExportError, Notes, OnTensor, Source, Target, card, check_exported, write};
use crate::artifact::{AdapterTensors, NumberFormat, TensorType, write_adapter_and_head};
use crate::supernet::Kind;

/// Writes the sub-network's adapter; without `dtype` in the super-adapter's own number format.
///
/// # Errors
/// Beside files that cannot be read or written: a width that is cut, a number format that adapters have not.
pub fn peft(
    source: Source<'_>,
    dtype: Option<NumberFormat>,
    target: Target<'_>,
    on_tensor: OnTensor<'_>,
) -> Result<Notes, ExportError> {
    check_widths(source)?;
    if source.folder.adapter_config.sparse {
        return Err(ExportError::SparseAdapter);
    }
    let full = source.adapter()?.tensors;
    let number_type = match dtype {
        None => TensorType::of(&full),
        Some(NumberFormat::F32) => TensorType::F32,
        Some(NumberFormat::Bf16) => TensorType::Bf16,
        Some(other) => {
            let (dtype, format, possible) = (other.name(), "a PEFT adapter", "f32 and bf16");
            return Err(ExportError::Dtype { dtype, format, possible });
        }
    };
    let folder = source.folder(target, |folder| {
        let files = [CARD, "adapter_config.json", "adapter_model.safetensors"];
        check_exported(folder, |path| files.iter().any(|name| path.ends_with(name)))
    })?;
    let tensors = prefixes(source, full, on_tensor);
    let (config, head) = (&source.folder.adapter_config, source.folder.head()?);
    write_adapter_and_head(folder.path(), config, &tensors, &head, number_type)?;
    let class = if config.classifies { "AutoModelForSequenceClassification" } else { "AutoModelForCausalLM" };
    let how = format!(
        "    from peft import PeftModel\n    from transformers import {class}\n\n    \
         base = {class}.from_pretrained(\"BASE\")\n    model = PeftModel.from_pretrained(base, \"DIR\")"
    );
    let numbers = if number_type == TensorType::F32 { "f32" } else { "bf16" };
    let notes = Notes::new();
    write(&folder, CARD, &card::card(source, "peft", numbers, &how, &notes))?;
    folder.finish()?;
    Ok(notes)
}

fn check_widths(source: Source<'_>) -> Result<(), ExportError> {
    let choices = source.entry.sub_network.choices().iter();
    for (id, (group, &width)) in source.space.groups().iter().zip(choices).enumerate() {
        if group.kind != Kind::Rank && width != group.maximal() {
            let member = group.members.first().map_or(String::new(), |&t| source.shape.tensor_name(t));
            let (name, full) = (source.entry.name.clone(), group.maximal());
            return Err(ExportError::CutWidth { name, group: id, member, width, full });
        }
    }
    Ok(())
}

fn prefixes(source: Source<'_>, full: AdapterTensors, on_tensor: OnTensor<'_>) -> AdapterTensors {
    let (active, count) = (source.active(), full.len());
    let mut cut = AdapterTensors::new();
    for (done, (module, (a, b))) in full.into_iter().enumerate() {
        on_tensor(done, count, &module);
        // The adapter has been checked against the model: every module of it has a place.
        let Some(index) = source.shape.find(&module) else { continue };
        let (rank, inp, out) = (active.linears[index].rank, a.columns, b.rows);
        cut.insert(module, (a.prefix(rank, inp), b.prefix(out, rank)));
    }
    cut
}
