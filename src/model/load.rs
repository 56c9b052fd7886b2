//! From files to Linears on some backend: what all families load alike. Base tensors by their Hugging Face names, adapters by
//! PEFT's.

use super::{Adapters, Layout, Orders};
use crate::artifact::{AdapterTensors, ArtifactError, Base, HeadTensors};
use crate::backend::{Adapter, Backend, BackendError, Linear};
use crate::supernet::{LinearShape, ModelShape};
use crate::weights::{HostData, HostMatrix, HostVector};
use std::sync::Arc;

/// One super-adapter to load beside the base.
pub struct SuperAdapter {
    /// The model's Linears with this super-adapter's ranks.
    pub shape: ModelShape,
    pub tensors: AdapterTensors,
    /// What it has in the place of the base's own: a classifier's head. Empty for language models.
    pub head: HeadTensors,
    /// `alpha / R_config`
    pub scale: f32,
    /// `s B A` counts only where the base's weight is not 0 (SparsePEFT), which no product with A and then B computes.
    pub sparse: bool,
}

impl SuperAdapter {
    /// Whether it has the tensors that its shape says, and no others.
    pub fn check(&self) -> Result<(), LoadError> {
        for module in self.tensors.keys() {
            let place = self.shape.find(module).map(|i| &self.shape.linears[i]);
            if place.is_none_or(|linear| linear.rank.is_none()) {
                return Err(LoadError::StrayAdapter { module: module.clone() });
            }
        }
        for linear in &self.shape.linears {
            let Some(rank) = linear.rank else { continue };
            let Some((a, b)) = self.tensors.get(&linear.name) else {
                return Err(LoadError::MissingAdapter { module: linear.name.clone() });
            };
            for (matrix, expected) in [(a, (rank, linear.inp)), (b, (linear.out, rank))] {
                let got = (matrix.rows, matrix.columns);
                if got != expected {
                    return Err(LoadError::AdapterSize { tensor: matrix.name.clone(), expected, got });
                }
            }
        }
        self.check_head()
    }

    /// What was trained whole is a Linear of the model, with its bias.
    fn check_head(&self) -> Result<(), LoadError> {
        for (name, tensor) in &self.head {
            let stray = || LoadError::StrayAdapter { module: name.clone() };
            let (module, part) = name.rsplit_once('.').ok_or_else(stray)?;
            let linear = &self.shape.linears[self.shape.find(module).ok_or_else(stray)?];
            let (expected, partner) = match part {
                "weight" => (vec![linear.out, linear.inp], "bias"),
                "bias" => (vec![linear.out], "weight"),
                _ => return Err(stray()),
            };
            if tensor.shape != expected {
                let got = tensor.shape.clone();
                return Err(LoadError::HeadSize { tensor: name.clone(), expected, got });
            }
            let partner = format!("{module}.{partner}");
            if !self.head.contains_key(&partner) {
                return Err(LoadError::NoHead { tensor: partner });
            }
        }
        Ok(())
    }
}

/// Why a model could not be put together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("{family} models do not continue texts")]
    NoText { family: &'static str },
    #[error("{family} models do not classify texts")]
    NoClassifier { family: &'static str },
    #[error("there is no tensor `{tensor}`, neither in the base nor beside the adapter")]
    NoHead { tensor: String },
    #[error("tensor `{tensor}` beside the adapter: expected shape {expected:?}, got {got:?}")]
    HeadSize { tensor: String, expected: Vec<usize>, got: Vec<usize> },
    #[error("{what} needs a LLaMA, not a model of the {family} family")]
    OnlyLlama { what: &'static str, family: &'static str },
    #[error("the adapter has a tensor for `{module}`, which has no place in this model")]
    StrayAdapter { module: String },
    #[error("the adapter has no tensors for `{module}`, which its configuration targets")]
    MissingAdapter { module: String },
    #[error("adapter tensor `{tensor}`: expected {expected:?}, got {got:?} (rows, columns)")]
    AdapterSize { tensor: String, expected: (usize, usize), got: (usize, usize) },
    #[error(
        "the adapter is sparse (`sparse_adapter` in its configuration): it counts only where a base weight is not 0, so it \
         can only be added into the base (--merge-adapter, or an export)"
    )]
    Sparse,
}

/// Takes the Linears of a model, one after the other, from files to a backend.
pub(super) struct Loader<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) base: &'a Base,
    pub(super) layout: &'static Layout,
    shape: ModelShape,
    super_adapters: Vec<SuperAdapter>,
    /// Added into the base.
    merged: Option<SuperAdapter>,
    orders: &'a Orders,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// `orders` hold for the base and for every adapter alike.
    ///
    /// # Errors
    /// An adapter that does not fit the base, or a sparse one beside it.
    pub(super) fn new(
        backend: &'a B,
        base: &'a Base,
        adapters: Adapters,
        orders: &'a Orders,
    ) -> Result<Self, LoadError> {
        let (super_adapters, merged) = match adapters {
            Adapters::Beside(all) => (all, None),
            Adapters::Merged(adapter) => (Vec::new(), Some(adapter)),
        };
        super_adapters.iter().chain(&merged).try_for_each(SuperAdapter::check)?;
        if super_adapters.iter().any(|adapter| adapter.sparse) {
            return Err(LoadError::Sparse);
        }
        let (layout, shape) = (Layout::of(base.config.family), super::model_shape(&base.config, None));
        Ok(Self { backend, base, layout, shape, super_adapters, merged, orders })
    }

    /// A norm's weight or another vector of the base, in the file's order.
    pub(super) fn vector(&self, name: &str, length: usize) -> Result<B::Vector, LoadError> {
        Ok(self.backend.vector(self.base.vector(name, length)?)?)
    }

    /// An embedding or the vocabulary product.
    pub(super) fn table(&self, name: &str, rows: usize, columns: usize) -> Result<Arc<B::Matrix>, LoadError> {
        Ok(Arc::new(self.backend.table(self.base.matrix(name, rows, columns)?)?))
    }

    /// The Linear at a place of a layer.
    pub(super) fn linear(&mut self, layer: usize, place: usize) -> Result<Linear<B>, LoadError> {
        self.reordered(layer, place, None)
    }

    /// The same with its outputs in another order: output `i` is output `rows[i]` of the file. For a Linear that is in no order yet.
    pub(super) fn reordered(
        &mut self,
        layer: usize,
        place: usize,
        outputs: Option<&Vec<usize>>,
    ) -> Result<Linear<B>, LoadError> {
        let (rows, columns) = self.orders.of_linear(&self.base.config, layer, place);
        let bias = self.layout.has_bias(&self.base.config, place);
        self.any_linear(self.layout.index(layer, place), bias, rows.as_ref().or(outputs), columns.as_ref())
    }

    /// The base's own Linear after the layers, with a bias; `None` where it has not both.
    pub(super) fn linear_after(&mut self, number: usize) -> Result<Option<Linear<B>>, LoadError> {
        match self.any_linear(self.index_after(number), true, None, None) {
            Err(LoadError::Artifact(ArtifactError::MissingTensor { .. })) => Ok(None),
            linear => linear.map(Some),
        }
    }

    /// The one that stands in its place for a super-adapter, whose `head` has both its tensors or neither.
    pub(super) fn head_linear(
        &self,
        number: usize,
        head: &HeadTensors,
    ) -> Result<Option<Linear<B>>, LoadError> {
        let index = self.index_after(number);
        let name = &self.shape.linears[index].name;
        let tensor = |part: &str| Some((format!("{name}.{part}"), head.get(&format!("{name}.{part}"))?));
        let (Some((weight, w)), Some((bias, b))) = (tensor("weight"), tensor("bias")) else {
            return Ok(None);
        };
        let &[rows, columns] = w.shape.as_slice() else { return Ok(None) };
        let data = HostData::F32(w.values.clone());
        // A handful of rows decides everything: they are kept as precisely as a table.
        let weight = self.backend.table(HostMatrix { name: weight, rows, columns, data })?;
        let bias = self.backend.vector(HostVector { name: bias, data: b.values.clone() })?;
        Ok(Some(Linear { index, weight: Arc::new(weight), bias: Some(bias), adapters: Vec::new() }))
    }

    /// The heads of all super-adapters, in their order; those tensors are not needed here any more.
    pub(super) fn take_heads(&mut self) -> Vec<HeadTensors> {
        let all = self.super_adapters.iter_mut().chain(&mut self.merged);
        all.map(|adapter| std::mem::take(&mut adapter.head)).collect()
    }

    fn index_after(&self, number: usize) -> usize {
        self.layout.index(self.base.config.layers, 0) + number
    }

    fn any_linear(
        &mut self,
        index: usize,
        bias: bool,
        rows: Option<&Vec<usize>>,
        columns: Option<&Vec<usize>>,
    ) -> Result<Linear<B>, LoadError> {
        let LinearShape { name, out, inp, .. } = self.shape.linears[index].clone();
        let mut weight = self.base.matrix(&format!("{name}.weight"), out, inp)?;
        if !self.cut_alike(index)? {
            weight.data = HostData::F32(weight.to_f32());
        }
        if let Some(adapter) = &mut self.merged
            && let Some((a, b)) = adapter.tensors.remove(&name)
        {
            weight = weight.plus_product(adapter.scale, &b, &a, adapter.sparse);
        }
        let weight = self.backend.matrix(permuted(weight, rows, columns))?;
        let bias = if bias { Some(self.bias(&name, out, rows)?) } else { None };
        let mut adapters = Vec::with_capacity(self.super_adapters.len());
        for adapter in &mut self.super_adapters {
            let Some((a, b)) = adapter.tensors.remove(&name) else {
                adapters.push(None);
                continue;
            };
            let (a, b) = (permuted(a, None, columns), permuted(b, rows, None));
            let [a, b] = self.backend.adapter(a, b, &weight)?;
            adapters.push(Some(Adapter { a, b, scale: adapter.scale }));
        }
        Ok(Linear { index, weight: Arc::new(weight), bias, adapters })
    }

    /// Whether all Linears that read this one's inputs cut them into blocks in the same order: a row is cut once for all of them.
    /// GPTQ sorts inputs by what they were, so its Linears agree; files that do not are not worth kernels of their own.
    fn cut_alike(&self, index: usize) -> Result<bool, LoadError> {
        let (layer, place) = self.layout.place(index);
        let together =
            self.layout.together.iter().find(|t| layer < self.base.config.layers && t.contains(&place));
        let order = |&place: &usize| {
            let LinearShape { name, inp, .. } = &self.shape.linears[self.layout.index(layer, place)];
            self.base.column_groups(&format!("{name}.weight"), *inp)
        };
        let orders = together.into_iter().flat_map(|t| t.iter()).map(order).collect::<Result<Vec<_>, _>>()?;
        Ok(orders.windows(2).all(|pair| pair[0] == pair[1]))
    }

    fn bias(&self, name: &str, out: usize, order: Option<&Vec<usize>>) -> Result<B::Vector, LoadError> {
        let HostVector { name, data } = self.base.vector(&format!("{name}.bias"), out)?;
        let data = order.map_or_else(|| data.clone(), |order| order.iter().map(|&i| data[i]).collect());
        Ok(self.backend.vector(HostVector { name, data })?)
    }
}

pub(super) fn permuted(
    matrix: HostMatrix,
    rows: Option<&Vec<usize>>,
    columns: Option<&Vec<usize>>,
) -> HostMatrix {
    let matrix = if let Some(order) = rows { matrix.permute_rows(order) } else { matrix };
    if let Some(order) = columns { matrix.permute_columns(order) } else { matrix }
}
