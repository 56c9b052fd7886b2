//! One sub-network as an ordinary LLaMA: the super-adapter folded into the base, everything cut to its prefixes.
//!
//! `W'[:o, :i] = W[:o, :i] + s B[:o, :r] A[:r, :i]`, in f32, in the super-network's own order. Layers of which nothing is
//! kept are not there, and those behind them move up.
//!
//! Tensors are read one by one, so that a model of any size needs the memory of its largest tensor.

use super::base_tensors;
use crate::artifact::{Base, BaseConfig, BaseTensor, Family};
use crate::model::load::permuted;
use crate::model::{Layout, LoadError, Orders, SuperAdapter};
use crate::supernet::{ActiveLinear, ActiveShape};

/// A sub-network's tensors as a LLaMA without adapters has them.
pub struct Plain<'a> {
    base: &'a Base,
    layout: &'static Layout,
    adapter: SuperAdapter,
    active: ActiveShape,
    orders: &'a Orders,
    /// The base's layers that are kept, by their numbers there.
    layers: Vec<usize>,
}

/// How many heads a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    pub query: usize,
    pub kv: usize,
}

/// A tensor of the plain model, in Hugging Face's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainTensor {
    pub name: String,
    /// `(rows, columns)` of a matrix, `(n)` of a norm's weight or a bias.
    pub shape: Vec<usize>,
    /// The base's name of it, where a layer's number may be another.
    in_base: String,
    part: Part,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The embedding, the vocabulary product, norms: no sub-network cuts them.
    Whole,
    Weight(usize),
    Bias(usize),
}

impl<'a> Plain<'a> {
    /// `active` is the sub-network's; `orders` as for [`super::load`].
    ///
    /// # Errors
    /// An adapter that does not fit the base, or a base that is no LLaMA.
    pub fn new(
        base: &'a Base,
        adapter: SuperAdapter,
        active: ActiveShape,
        orders: &'a Orders,
    ) -> Result<Self, LoadError> {
        adapter.check()?;
        let layout = Layout::of(base.config.family);
        if base.config.family != Family::Llama {
            return Err(LoadError::OnlyLlama { what: "an export", family: layout.name });
        }
        // What a layer adds comes from those who read its heads and its channels, or is their bias.
        let readers = layout.heads.map(|(_, reader)| reader).into_iter().chain([layout.mlp.1]);
        let adds = |layer: usize, place: usize| {
            !active.linears[layout.index(layer, place)].is_nothing() || layout.has_bias(&base.config, place)
        };
        let is_kept = |layer: &usize| readers.clone().any(|place| adds(*layer, place));
        let layers = (0..base.config.layers).filter(is_kept).collect();
        Ok(Self { base, layout, adapter, active, orders, layers })
    }

    /// The base's layers that are kept, by their numbers there, rising.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// The MLP's width, layer by layer.
    pub fn widths(&self) -> Vec<usize> {
        let gate = |layer: &usize| self.layout.index(*layer, self.layout.mlp.0[0]);
        self.layers.iter().map(|layer| self.active.linears[gate(layer)].out).collect()
    }

    /// The query and key-value heads, layer by layer.
    pub fn heads(&self) -> Vec<Heads> {
        let size = self.config().head_size;
        let of = |layer, place| self.active.linears[self.layout.index(layer, place)].out / size;
        self.layers.iter().map(|&layer| Heads { query: of(layer, 0), kv: of(layer, 1) }).collect()
    }

    /// All tensors, in the order in which the model uses them.
    pub fn tensors(&self) -> Vec<PlainTensor> {
        base_tensors(self.config()).into_iter().filter_map(|tensor| self.cut(tensor)).collect()
    }

    /// What the sub-network keeps of a base's tensor.
    fn cut(&self, BaseTensor { name, shape }: BaseTensor) -> Option<PlainTensor> {
        let in_base = name.clone();
        let number = |layer: &usize| name.strip_prefix(&self.layout.layer(*layer));
        let of_layer = (0..self.config().layers).find_map(|layer| Some((layer, number(&layer)?)));
        let name = match of_layer {
            None => name,
            Some((layer, rest)) => {
                format!("{}{rest}", self.layout.layer(self.layers.binary_search(&layer).ok()?))
            }
        };
        let (module, kind) = in_base.rsplit_once('.').unwrap_or((&in_base, ""));
        let layers = self.layout.index(self.config().layers, 0);
        let (shape, part) = match self.adapter.shape.find(module).filter(|&index| index < layers) {
            None => (shape, Part::Whole),
            Some(index) => {
                let ActiveLinear { out, inp, .. } = self.active.linears[index];
                if kind == "bias" {
                    (vec![out], Part::Bias(index))
                } else {
                    (vec![out, inp], Part::Weight(index))
                }
            }
        };
        Some(PlainTensor { name, shape, in_base, part })
    }

    /// The values of a tensor, row-major.
    ///
    /// # Errors
    /// A tensor that the base has not, or in another size.
    pub fn read(&self, tensor: &PlainTensor) -> Result<Vec<f32>, LoadError> {
        match (tensor.part, tensor.shape.as_slice()) {
            (Part::Weight(index), _) => self.weight(index),
            (Part::Bias(index), _) => self.bias(index),
            (Part::Whole, &[rows, columns]) => {
                Ok(self.base.matrix(&tensor.in_base, rows, columns)?.prefix(rows, columns).into_f32())
            }
            (Part::Whole, shape) => Ok(self.base.vector(&tensor.in_base, shape.iter().product())?.data),
        }
    }

    fn weight(&self, index: usize) -> Result<Vec<f32>, LoadError> {
        let full = &self.adapter.shape.linears[index];
        let ActiveLinear { out, inp, rank } = self.active.linears[index];
        let (rows, columns) = self.orders(index);
        let weight = self.base.matrix(&format!("{}.weight", full.name), full.out, full.inp)?;
        let (rows, columns) = (rows.as_ref(), columns.as_ref());
        let weight = permuted(weight, rows, columns).prefix(out, inp);
        let Some((a, b)) = self.adapter.tensors.get(&full.name) else { return Ok(weight.into_f32()) };
        let a = permuted(a.clone(), None, columns).prefix(rank, inp);
        let b = permuted(b.clone(), rows, None).prefix(out, rank);
        Ok(weight.plus_product(self.adapter.scale, &b, &a, self.adapter.sparse).into_f32())
    }

    fn bias(&self, index: usize) -> Result<Vec<f32>, LoadError> {
        let full = &self.adapter.shape.linears[index];
        let bias = self.base.vector(&format!("{}.bias", full.name), full.out)?.data;
        let out = self.active.linears[index].out;
        Ok(match self.orders(index).0 {
            Some(order) => order.iter().take(out).map(|&row| bias[row]).collect(),
            None => bias[..out].to_vec(),
        })
    }

    /// The orders of a Linear's rows and columns, where they are not the file's.
    fn orders(&self, index: usize) -> (Option<Vec<usize>>, Option<Vec<usize>>) {
        let (layer, place) = self.layout.place(index);
        self.orders.of_linear(self.config(), layer, place)
    }

    fn config(&self) -> &BaseConfig {
        &self.base.config
    }
}
