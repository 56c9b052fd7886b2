//! From a base's family to the model that computes it.

use super::load::{LoadError, Loader, SuperAdapter};
use super::{CausalExecutor, Classifier, Executor, Orders, bert, bloom, llama, mpt};
use crate::artifact::{Base, Family};
use crate::backend::Backend;

/// What stands beside a base, or in it.
pub enum Adapters {
    /// Each computed beside the base.
    Beside(Vec<SuperAdapter>),
    /// Added into the base once: `W + s B A`, at full rank. Prefixes of the sum are those of a sub-network that keeps all ranks, see
    /// [`ModelShape::keeps_ranks`](crate::supernet::ModelShape::keeps_ranks).
    Merged(SuperAdapter),
}

/// Loads a model that continues texts, of whichever family, with a pool of `blocks` blocks of `block_size` positions.
///
/// `orders` hold for the base and for every adapter alike.
///
/// # Errors
/// A family that does not continue texts, a tensor that is missing or has the wrong size, or a backend without memory.
pub fn executor<B: Backend>(
    backend: B,
    base: &Base,
    adapters: Adapters,
    orders: &Orders,
    (blocks, block_size): (usize, usize),
) -> Result<Box<dyn Executor>, LoadError> {
    let family = base.config.family;
    let loader = Loader::new(&backend, base, adapters, orders)?;
    match family {
        Family::Llama => {
            let model = llama::model(loader)?;
            Ok(Box::new(CausalExecutor::new(model, backend, blocks, block_size)?))
        }
        Family::Bloom => {
            let model = bloom::model(loader)?;
            Ok(Box::new(CausalExecutor::new(model, backend, blocks, block_size)?))
        }
        Family::Mpt => {
            let model = mpt::model(loader)?;
            Ok(Box::new(CausalExecutor::new(model, backend, blocks, block_size)?))
        }
        Family::Bert => Err(LoadError::NoText { family: loader.layout.name }),
    }
}

/// Loads a model that classifies texts. `orders` as for [`executor`].
///
/// # Errors
/// A family that does not classify, a tensor that is missing or has the wrong size, or a backend without memory.
pub fn classifier<B: Backend>(
    backend: B,
    base: &Base,
    adapters: Adapters,
    orders: &Orders,
) -> Result<Box<dyn Classifier>, LoadError> {
    let loader = Loader::new(&backend, base, adapters, orders)?;
    match base.config.family {
        Family::Bert => {
            let model = bert::model(loader)?;
            Ok(Box::new(bert::BertClassifier::new(model, backend)))
        }
        Family::Llama | Family::Bloom | Family::Mpt => {
            Err(LoadError::NoClassifier { family: loader.layout.name })
        }
    }
}
