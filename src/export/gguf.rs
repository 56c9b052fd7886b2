//! A GGUF file as llama.cpp reads it.
//!
//! llama.cpp's `llama` has one MLP width and one number of heads for all layers. Its `deci`, made for pruned LLaMAs, is the same
//! computation with both for each layer, so a sub-network whose layers differ is written as one of those.

use super::{
    CARD, ExportError, Notes, OnTensor, Source, Target, card, check_exported, gguf_metadata, out, write,
};
use crate::artifact::{
    ArtifactError, BaseConfig, GgufWriter, NumberFormat, OutTensor, gguf_has, gguf_name, interleaved,
};
use crate::model::llama::{Plain, PlainTensor};
use crate::weights::BLOCK;
use std::path::Path;

/// Writes the sub-network's GGUF file: to the target itself if that ends in `.gguf`, else into a folder of that name,
/// with a model card.
///
/// # Errors
/// Beside files that cannot be read or written: a tokenizer.json that a GGUF file cannot hold.
pub fn gguf(
    source: Source<'_>,
    dtype: NumberFormat,
    target: Target<'_>,
    on_tensor: OnTensor<'_>,
) -> Result<Notes, ExportError> {
    let Target { path, overwrite } = target;
    if path.extension().is_some_and(|e| e == "gguf") {
        source.check_apart(target)?;
        check_free(path, overwrite)?;
        return file(source, dtype, path, on_tensor);
    }
    let folder = source.folder(target, |folder| {
        check_exported(folder, |path| path.ends_with(CARD) || gguf_has(path, gguf_metadata::MARK))
    })?;
    let name = format!("{}.gguf", source.name());
    let notes = file(source, dtype, &folder.path().join(&name), on_tensor)?;
    let how = format!("    llama-server -m {name}\n    llama-cli -m {name} -p \"...\"");
    write(&folder, CARD, &card::card(source, "gguf", dtype.name(), &how, &notes))?;
    folder.finish()?;
    Ok(notes)
}

/// Whether a file may be written there; of files that are there, only an earlier export is replaced.
fn check_free(path: &Path, overwrite: bool) -> Result<(), ArtifactError> {
    if !path.exists() || overwrite && gguf_has(path, gguf_metadata::MARK) {
        return Ok(());
    }
    if !overwrite {
        return Err(ArtifactError::Exists { path: path.into() });
    }
    let reason =
        format!("its metadata has no `{}`, so no export wrote it; not replaced", gguf_metadata::MARK);
    Err(ArtifactError::Wrong { path: path.into(), reason })
}

fn file(
    source: Source<'_>,
    dtype: NumberFormat,
    path: &Path,
    on_tensor: OnTensor<'_>,
) -> Result<Notes, ExportError> {
    check_base(&source.base.config)?;
    let plain = source.plain()?;
    let mut notes = Notes::new();
    let metadata = gguf_metadata::metadata(source, &plain, dtype, &mut notes)?;
    let tensors = plain.tensors();
    let planned = tensors.iter().map(|t| planned(t, dtype)).collect::<Vec<_>>();
    let fallen = |t: &&OutTensor| dtype == NumberFormat::Q8_0 && t.format == NumberFormat::F16;
    let fallen = planned.iter().filter(fallen).count();
    if fallen > 0 {
        notes.push(format!("{fallen} matrices are f16: their rows are not whole blocks of {BLOCK}."));
    }
    let mut writer = GgufWriter::create(path, &metadata, planned)?;
    for (done, tensor) in tensors.iter().enumerate() {
        on_tensor(done, tensors.len(), &tensor.name);
        writer.tensor(&values(&source.base.config, &plain, tensor)?)?;
    }
    writer.finish()?;
    Ok(notes)
}

/// What llama.cpp has under other architectures than `llama`, or in tensors of its own.
fn check_base(config: &BaseConfig) -> Result<(), ExportError> {
    let found = [
        (!config.rope_factors.is_empty(), "scaled positions"),
        (config.window.is_some(), "a sliding window"),
        (config.head_norms, "norms of heads"),
        (config.attention_bias != config.output_bias, "biases of queries, keys and values only"),
    ];
    let found = found.into_iter().find(|(is_there, _)| *is_there);
    found.map_or(Ok(()), |(_, what)| Err(ExportError::NotInGguf { what }))
}

fn planned(tensor: &PlainTensor, dtype: NumberFormat) -> OutTensor {
    let blocks = tensor.shape.last().is_some_and(|row| row.is_multiple_of(BLOCK));
    let dtype = if dtype == NumberFormat::Q8_0 && !blocks { NumberFormat::F16 } else { dtype };
    // Every tensor of a LLaMA has a name there.
    let name = gguf_name(&tensor.name).unwrap_or_else(|| tensor.name.clone());
    out(tensor, name, dtype, NumberFormat::F32)
}

/// Row-major, the rows of q and k (and their biases) in llama.cpp's order.
fn values(config: &BaseConfig, plain: &Plain<'_>, tensor: &PlainTensor) -> Result<Vec<f32>, ExportError> {
    let values = plain.read(tensor)?;
    if ![".q_proj.", ".k_proj."].iter().any(|module| tensor.name.contains(module)) {
        return Ok(values);
    }
    let columns = tensor.shape.get(1).copied().unwrap_or(1);
    let rows = interleaved(tensor.shape[0], tensor.shape[0] / config.head_size).into_iter();
    Ok(rows.flat_map(|row| &values[row * columns..(row + 1) * columns]).copied().collect())
}
