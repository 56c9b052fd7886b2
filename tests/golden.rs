//! Opening what lies under `tests/golden`, which PyTorch, transformers and PEFT have written.

use lonas::artifact::{Base, ModelFolder};
use lonas::backend::{Backend, Segment, Selection, SequenceSpan};
use lonas::model::llama::{self, Llama};
use lonas::model::{self, Adapters, Batch, Executor, Layout, Orders, SuperAdapter};
use lonas::supernet::{ModelShape, SearchSpace, SubNetwork};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `tests/golden/NAME`
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub(crate) fn json<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(path(name)).unwrap()).unwrap()
}

/// Every f32 tensor of a safetensors file.
pub(crate) fn tensors(name: &str) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path(name)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let values =
        |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    file.iter().map(|(name, view)| (name.to_string(), values(view.data()))).collect()
}

/// A tiny super-network, opened.
pub(crate) struct Supernet {
    pub(crate) base: Base,
    pub(crate) folder: ModelFolder,
    pub(crate) shape: ModelShape,
    pub(crate) space: SearchSpace,
    pub(crate) orders: Orders,
}

impl Supernet {
    /// `base` is relative to `tests/golden`; `name/supernet` is the model folder.
    pub(crate) fn open(base: &str, name: &str) -> Self {
        Self::of(&path(base), &path(name).join("supernet"))
    }

    /// Of any base and model folder.
    pub(crate) fn of(base: &Path, folder: &Path) -> Self {
        let base = Base::open(base).unwrap();
        let folder = ModelFolder::open(folder).unwrap();
        let config = base.config.with_head_of(folder.path()).unwrap();
        let shape = model::model_shape(&config, Some(&folder.adapter_config));
        let space = folder.search_space(&shape).unwrap();
        let layout = Layout::of(base.config.family);
        let orders = Orders::of_groups(layout, &space, folder.orders());
        Self { base, folder, shape, space, orders }
    }

    pub(crate) fn load<B: Backend>(&self, backend: &B) -> Llama<B> {
        llama::load(backend, &self.base, vec![self.super_adapter()], &self.orders).unwrap()
    }

    /// Of whichever family.
    pub(crate) fn executor<B: Backend>(
        &self,
        backend: B,
        adapters: Adapters,
        pool: (usize, usize),
    ) -> Box<dyn Executor> {
        model::executor(backend, &self.base, adapters, &self.orders, pool).unwrap()
    }

    pub(crate) fn super_adapter(&self) -> SuperAdapter {
        SuperAdapter {
            shape: self.shape.clone(),
            tensors: self.folder.adapter().unwrap(),
            head: self.folder.head().unwrap(),
            scale: self.folder.adapter_config.scale() as f32,
            sparse: self.folder.adapter_config.sparse,
        }
    }

    pub(crate) fn selection(&self, id: u32, sub_network: &SubNetwork) -> Selection {
        let shape = Arc::new(self.space.resolve(&self.shape, sub_network));
        Selection { adapter: 0, subnetwork: id, shape }
    }
}

/// Appends `tokens` as positions `start..` of a sequence with these cache blocks; logits of every row are wanted.
pub(crate) fn push(batch: &mut Batch, selection: Selection, tokens: &[u32], start: usize, blocks: &[u32]) {
    let first = batch.tokens.len();
    let rows = first..first + tokens.len();
    batch.tokens.extend(tokens);
    batch.positions.extend((start..start + tokens.len()).map(|p| p as u32));
    batch.outputs.extend(rows.clone().map(|r| r as u32));
    batch.spans.push(SequenceSpan { rows: rows.clone(), start, blocks: blocks.to_vec() });
    match batch.segments.last_mut() {
        Some(last) if last.selection == selection => last.rows.end = rows.end,
        _ => batch.segments.push(Segment { rows, selection }),
    }
}

/// The largest absolute difference.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}
